"""Figures that several pages draw, and the sentences that they print in both languages."""

from pss.plots.figures import (
    METHOD_COLORS,
    METHOD_LABELS,
    confidence_bars,
    difference_bars,
    edit_lines,
    edit_panels,
    image_row,
    method_curves,
    overlay,
    overlay_grid,
    plain,
    profile_by_layer,
    render_map,
    say,
    show,
    stage_bars,
    stage_colors,
    story,
    top_confidences,
    use_style,
)
