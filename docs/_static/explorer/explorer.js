/* The explorer: draws what `python -m pss explorer` computed. No server, no other host; data come as scripts, so that a
   folder on disk works as well. Mount: <div id="pss-explorer" data-root="folder of data/ and vendor/">. */
(function () {
  "use strict";

  const TEXT = {
    en: {
      loading: "Loading …",
      failed: (file) => `The explorer could not load ${file}. Its data are made by “make site”.`,
      set: "Images and network",
      sets: {
        digits: "Digits, a small ResNet-18",
        photographs: "Photographs, EfficientNet-Lite0",
      },
      image: "Misclassified image",
      method: "Ranking of the filters",
      methods: {
        zscore: "z-score",
        pot: "POT",
        scale_free_pot: "POT, scale-free",
        raw: "raw saliency",
        gain: "gain of the margin",
        layer_matched_random: "random, layers as POT",
      },
      count: "Filters to edit, k",
      views: { "": "", whole: "", cropped: " (cropped)", blurred: " (blurred)" },
      read: (label, guess, view) => `${label}${view}, read as ${guess}`,
      quote: (name) => (/^\d+$/.test(name) ? name : `“${name}”`),
      result: (r) =>
        `${r.label}${r.view}, read as ${r.guess} with confidence ${r.was}; confidence in ${r.label}: ${r.own}. ` +
        `${r.significant} of ${r.units} filters are significant at a false-discovery rate of 5% (POT). ` +
        `With the first ${r.k} by ${r.method} fine-tuned, it is read as ${r.finetune.guess} (confidence in ${r.label}: ${r.finetune.own})` +
        `${r.finetune.right ? ", which is right" : ""}; with them pruned, as ${r.prune.guess} (${r.prune.own})` +
        `${r.prune.right ? ", which is right" : ""}. ` +
        `Of ${r.retain} other images that were right, ${r.finetune.stay} stay right when the first ${r.at} are fine-tuned, ${r.prune.stay} when they are pruned.`,
      picture: "The image",
      map: (units, boost) => `Input-space map: the pixels that drive its first ${units} filters (boosted ${boost} times)`,
      pictureAlt: (what) => `The image: ${what}.`,
      mapAlt: (what, method) => `Map of the pixels that drive the top filters by ${method}, over the darkened image: ${what}.`,
      profile: "Profile by layer",
      profileNote: {
        zscore: "Each dot is a filter, in the order of the network: its z-score, on an asinh axis. Rings: the first k.",
        pot: "Each dot is a filter, in the order of the network: its tail probability under the fitted tail, rarer upwards. Rings: the first k.",
        scale_free_pot:
          "Each dot is a filter, in the order of the network: its tail probability once every profile is divided by its own mean, rarer upwards. Rings: the first k.",
        raw: "Each dot is a filter, in the order of the network: its saliency; exact zeros are not drawn. Rings: the first k.",
        gain: "Each dot is a filter, in the order of the network: what it contributes to the margin of the class read over the true one, on an asinh axis. Rings: the first k.",
        layer_matched_random:
          "Tail probabilities as for POT. Rings: random filters, as many in every layer as the first k by POT. One draw.",
      },
      profileAlt: (k, stages) => `Profile of all filters, coloured by stage. The first ${k} lie in ${stages}. The table below names them.`,
      units: "filter, in the order of the network",
      axes: { zscore: "z-score", pot: "tail probability p", scale_free_pot: "tail probability p", raw: "saliency", gain: "gain", layer_matched_random: "tail probability p" },
      repair: "What repair does",
      repairNote:
        "Thick: the chosen ranking; thin: the others. Solid: confidence in the true class; dashed: in the class first predicted. The grey line marks k.",
      edits: { finetune: "One-step fine-tuning", prune: "Pruning" },
      elsewhere: "Elsewhere: still right",
      elsewhereNote: (retain) => `Share of ${retain} other images, which were right, that stay right. Solid: fine-tuned; dashed: pruned.`,
      edited: "filters edited, k",
      confidence: "confidence",
      share: "share still right",
      curveAlt: (edit, label, from, to, k) => `${edit}: confidence in ${label} goes from ${from} to ${to} at k = ${k}. The table below has the numbers.`,
      elsewhereAlt: (at, a, b) => `After the first ${at} edits ${a} stay right with fine-tuning, ${b} with pruning.`,
      top: (k) => `The first ${k} filters`,
      columns: ["rank", "filter", "layer", "stage", "z", "p", "saliency"],
      curves: "The repair as a table",
      curveColumns: ["k", "fine-tuned: read as", "confidence, true", "confidence, first predicted", "pruned: read as", "confidence, true", "confidence, first predicted"],
      beyond: "0 (beyond the tail’s end)",
      filter: (layer, number) => `${layer}[${number}]`,
    },
    ja: {
      loading: "読み込み中……",
      failed: (file) => `${file}を読み込めなかった．データは「make site」で作られる．`,
      set: "画像とネットワーク",
      sets: {
        digits: "手書き数字，小さなResNet-18",
        photographs: "写真，EfficientNet-Lite0",
      },
      image: "誤分類画像",
      method: "フィルタの順位付け",
      methods: {
        zscore: "z得点",
        pot: "POT",
        scale_free_pot: "スケールフリーのPOT",
        raw: "生の顕著性",
        gain: "マージンのゲイン",
        layer_matched_random: "無作為（層の内訳はPOTと同じ）",
      },
      count: "編集するフィルタ数 k",
      views: { "": "", whole: "", cropped: "（切り抜き）", blurred: "（ぼかし）" },
      read: (label, guess, view) => `${label}${view}を${guess}と誤読`,
      quote: (name) => `「${name}」`,
      result: (r) =>
        `${r.label}${r.view}を${r.guess}と読んだ（確信度${r.was}，正解の${r.label}の確信度は${r.own}）．` +
        `偽発見率5%で有意なフィルタは，POTによれば${r.units}個中${r.significant}個である．` +
        `${r.method}による上位${r.k}個をファインチューニングすると${r.finetune.guess}と読む（${r.label}の確信度${r.finetune.own}${r.finetune.right ? "，正解" : ""}）．` +
        `枝刈りすると${r.prune.guess}と読む（同${r.prune.own}${r.prune.right ? "，正解" : ""}）．` +
        `もともと正解だったほかの${r.retain}枚のうち正解のまま残るのは，上位${r.at}個のファインチューニングで${r.finetune.stay}，枝刈りで${r.prune.stay}である．`,
      picture: "画像",
      map: (units, boost) => `入力空間の顕著性：上位${units}個のフィルタ（${boost}倍に強調）を際立たせている画素`,
      pictureAlt: (what) => `画像：${what}．`,
      mapAlt: (what, method) => `${method}による上位フィルタを際立たせている画素のマップを，暗くした画像に重ねたもの：${what}．`,
      profile: "層毎のプロファイル",
      profileNote: {
        zscore: "点の一つ一つがフィルタで，ネットワークの順に並ぶ．縦軸はz得点（asinh軸）．丸印は上位k個を示す．",
        pot: "点の一つ一つがフィルタで，ネットワークの順に並ぶ．縦軸は当てはめた裾による裾確率で，上ほど珍しい．丸印は上位k個を示す．",
        scale_free_pot: "点の一つ一つがフィルタで，ネットワークの順に並ぶ．縦軸は，プロファイルをそれ自身の平均で割ってから求めた裾確率で，上ほど珍しい．丸印は上位k個を示す．",
        raw: "点の一つ一つがフィルタで，ネットワークの順に並ぶ．縦軸は顕著性．値が0のフィルタは描いていない．丸印は上位k個を示す．",
        gain: "点の一つ一つがフィルタで，ネットワークの順に並ぶ．縦軸は，予測クラスと正解クラスのロジットの差にそのフィルタが寄与する量（asinh軸）．丸印は上位k個を示す．",
        layer_matched_random: "縦軸はPOTと同じ裾確率．丸印は，層毎の個数をPOTの上位k個に揃えて無作為に1回選んだフィルタである．",
      },
      profileAlt: (k, stages) => `全フィルタのプロファイル．色はステージを表す．上位${k}個は${stages}にある．フィルタの名前は下の表に示す．`,
      units: "フィルタ（ネットワークの順）",
      axes: { zscore: "z得点", pot: "裾確率 p", scale_free_pot: "裾確率 p", raw: "顕著性", gain: "ゲイン", layer_matched_random: "裾確率 p" },
      repair: "補正の効果",
      repairNote: "太線は選んだ順位付け，細線はそのほか．実線は正解クラス，破線は最初に予測したクラスの確信度．灰色の縦線がkを示す．",
      edits: { finetune: "1ステップのファインチューニング", prune: "枝刈り" },
      elsewhere: "ほかの画像への影響",
      elsewhereNote: (retain) => `もともと正解だったほかの${retain}枚のうち，正解のまま残る割合．実線はファインチューニング，破線は枝刈り．`,
      edited: "編集したフィルタ数 k",
      confidence: "確信度",
      share: "正解のまま残る割合",
      curveAlt: (edit, label, from, to, k) => `${edit}：${label}の確信度はk = ${k}で${from}から${to}になる．数値は下の表に示す．`,
      elsewhereAlt: (at, a, b) => `上位${at}個の編集後に正解のまま残るのは，ファインチューニングで${a}，枝刈りで${b}．`,
      top: (k) => `上位${k}個のフィルタ`,
      columns: ["順位", "フィルタ", "層", "ステージ", "z", "p", "顕著性"],
      curves: "補正の結果を表で見る",
      curveColumns: ["k", "ファインチューニング後の予測", "正解クラスの確信度", "最初の予測クラスの確信度", "枝刈り後の予測", "正解クラスの確信度", "最初の予測クラスの確信度"],
      beyond: "0（裾の端を超える）",
      filter: (layer, number) => `${layer}[${number}]`,
    },
  };

  const mount = document.getElementById("pss-explorer");
  if (!mount) return;
  const T = TEXT[document.documentElement.lang.slice(0, 2)] || TEXT.en;
  const ROOT = new URL(mount.dataset.root || ".", document.baseURI).href.replace(/\/?$/, "/");
  const INK = "#222222", LINE = "#dddddd", RING = "#D55E00";
  const EDITS = ["finetune", "prune"];
  const DASHES = { finetune: [], prune: [6, 4] };
  const state = { set: "", image: 0, method: "zscore", k: 10 };
  const data = {};
  let index, charts, shown;

  /* ---- loading ---- */

  window.pssExplorer = (name, content) => { data[name] = content; };

  const scripts = {};
  function script(file) {
    scripts[file] = scripts[file] || new Promise((resolve, reject) => {
      const element = document.createElement("script");
      element.src = ROOT + file;
      element.onload = resolve;
      element.onerror = () => { delete scripts[file]; reject(new Error(T.failed(file))); };
      document.head.append(element);
    });
    return scripts[file];
  }
  const load = (name) => script(`data/${name}.js`).then(() => data[name]);

  /* ---- small helpers ---- */

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "text") element.textContent = value;
      else if (value !== false) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children);
    return element;
  }
  const short = (x) => (x === 0 ? "0" : Math.abs(x) >= 0.001 && Math.abs(x) < 1e5 ? String(+x.toPrecision(3)) : x.toExponential(1));
  const percent = (x) => `${(100 * x).toFixed(1).replace(/\.0$/, "")}%`;
  const named = (id) => T.quote(index.sets[state.set].classes[id]);
  const superscript = (n) => String(n).replace(/-/, "⁻").replace(/\d/g, (d) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[d]);
  const reading = (set, image) => {
    const name = (id) => T.quote(index.sets[set].classes[id]);
    return T.read(name(image.label), name(image.predicted), T.views[image.view]);
  };

  function unpack(packed) {
    const bytes = Uint8Array.from(atob(packed.data), (c) => c.charCodeAt(0));
    return Float64Array.from(bytes, (b) => (b === 255 ? NaN : packed.low + packed.step * b));
  }
  function locate(unit) {
    const layers = index.sets[state.set].layers;
    let at = layers.length - 1;
    while (layers[at][2] > unit) at -= 1;
    return { layer: layers[at][0], stage: layers[at][1], number: unit - layers[at][2] };
  }
  const before = (p) => (p === null ? T.beyond : short(10 ** p));

  /* ---- controls: native radio buttons and a range, so that Tab and the arrow keys work ---- */

  function radios(name, legend, options, chosen, changed) {
    const group = make("fieldset", { class: `pss-${name}` }, make("legend", { text: legend }));
    for (const { value, content, label } of options) {
      const input = make("input", { type: "radio", name: `pss-${name}`, value, checked: value === String(chosen) });
      if (label) input.setAttribute("aria-label", label);
      input.addEventListener("change", () => changed(value));
      group.append(make("label", {}, input, content));
    }
    return group;
  }

  function thumbnails() {
    const options = index.sets[state.set].images.map((image, i) => ({
      value: String(i),
      label: reading(state.set, image),
      content: make("img", { src: image.thumbnail, alt: "", width: 44, height: 44, title: reading(state.set, image) }),
    }));
    return radios("image", T.image, options, state.image, (value) => { state.image = Number(value); change(); });
  }

  function build() {
    const sets = Object.keys(index.sets).map((value) => ({ value, content: make("span", { text: T.sets[value] }) }));
    const methods = Object.entries(index.methods).map(([value, color]) => ({
      value,
      content: make("span", {}, make("i", { style: `background:${color}`, "aria-hidden": "true" }), T.methods[value]),
    }));
    const range = make("input", { type: "range", id: "pss-k", min: 1, max: index.k, value: state.k });
    const output = make("output", { for: "pss-k", text: state.k });
    range.addEventListener("input", () => { state.k = Number(range.value); output.textContent = state.k; show(); });
    const images = make("div", {}, thumbnails());
    const controls = make("form", { class: "pss-controls" },
      radios("set", T.set, sets, state.set, (value) => {
        state.set = value;
        state.image = 0;
        images.replaceChildren(thumbnails());
        change();
      }),
      images,
      radios("method", T.method, methods, state.method, (value) => { state.method = value; show(); }),
      make("p", { class: "pss-range" }, make("label", { for: "pss-k", text: `${T.count}: ` }), output, range));
    controls.addEventListener("submit", (event) => event.preventDefault());

    const part = (title, note, id, ...children) =>
      make("section", { "aria-labelledby": id }, make("h2", { id, text: title }), ...(note ? [make("p", { id: `${id}-note`, text: note })] : []), ...children);
    const chart = (id, title) => make("figure", { class: "pss-chart" }, ...(title ? [make("figcaption", { text: title })] : []), make("div", { id, role: "img", "aria-label": "" }));
    mount.replaceChildren(
      controls,
      make("p", { id: "pss-result", role: "status", "aria-live": "polite" }),
      make("div", { class: "pss-pictures" },
        make("figure", {}, make("img", { id: "pss-picture", alt: "" }), make("figcaption", { text: T.picture })),
        make("figure", {}, make("img", { id: "pss-map", alt: "" }), make("figcaption", { id: "pss-map-caption", text: T.map(index.map_units, index.boost) }))),
      part(T.profile, " ", "pss-profile-title", make("p", { id: "pss-stages" }), chart("pss-profile")),
      part(T.repair, T.repairNote, "pss-repair-title",
        make("div", { class: "pss-row" }, ...EDITS.map((edit) => chart(`pss-${edit}`, T.edits[edit])), chart("pss-elsewhere", T.elsewhere)),
        make("p", { id: "pss-elsewhere-note" })),
      part("", "", "pss-top-title", make("div", { class: "pss-scroll", tabindex: 0, role: "region", "aria-labelledby": "pss-top-title" }, make("table", { id: "pss-top" }))),
      make("details", {}, make("summary", { text: T.curves }),
        make("div", { class: "pss-scroll", tabindex: 0, role: "region", "aria-label": T.curves }, make("table", { id: "pss-curves" }))));
  }

  /* ---- charts ---- */

  function figure(options) {
    const made = Bokeh.Plotting.figure({
      height: 260, sizing_mode: "stretch_width", toolbar_location: null, tools: "", min_border: 4,
      background_fill_color: "white", border_fill_color: "white", outline_line_color: null, ...options,
    });
    for (const axis of [...made.below, ...made.left]) {
      axis.axis_label_text_color = axis.major_label_text_color = INK;
      axis.axis_label_text_font_style = "normal";
      axis.minor_tick_line_color = null;
    }
    for (const grid of made.center) grid.grid_line_color = LINE;
    return made;
  }

  function drawCharts() {
    const column = (names) => new Bokeh.ColumnDataSource({ data: Object.fromEntries(names.map((name) => [name, []])) });
    const xy = (glyph) => ({ x: { field: "x" }, y: { field: "y" }, ...glyph });
    const result = { dots: column(["x", "y", "color", "name", "value"]), rings: column(["x", "y"]), lines: {}, spans: [] };

    const profile = figure({ height: 300, x_range: [0, 1], y_range: [0, 1], x_axis_label: T.units, y_axis_label: " " });
    const drawn = profile.scatter({ ...xy({ size: 4, line_color: null, fill_color: { field: "color" } }), source: result.dots });
    profile.scatter({ ...xy({ size: 11, line_width: 1.6, line_color: RING, fill_color: null }), source: result.rings });
    profile.add_tools(new Bokeh.HoverTool({ renderers: [drawn], tooltips: [["", "@name"], ["", "@value"]] }));
    result.profile = profile;

    const marker = () => new Bokeh.Span({ dimension: "height", location: state.k, line_color: "#999999", line_width: 2 });
    const range = { x_range: [-0.5, index.k + 0.5], x_axis_label: T.edited };
    const line = (chart, key) => {
      const source = column(["x", "y"]);
      result.lines[key] = { source, glyph: chart.line({ ...xy({ line_width: 1, line_color: INK }), source }).glyph };
    };
    const all = { "pss-profile": profile };
    for (const edit of [...EDITS, "elsewhere"]) {
      const chart = figure({ ...range, y_range: [-0.02, 1.02], y_axis_label: edit === "elsewhere" ? T.share : T.confidence });
      const span = marker();
      chart.add_layout(span);
      result.spans.push(span);
      for (const method of Object.keys(index.methods)) {
        if (edit !== "elsewhere") line(chart, `${edit} ${method}`);
        else for (const e of EDITS) line(chart, `elsewhere ${e} ${method}`);
      }
      if (edit !== "elsewhere") line(chart, `${edit} wrong`);
      all[`pss-${edit}`] = chart;
    }
    return Promise.all(Object.entries(all).map(([id, chart]) => Bokeh.Plotting.show(chart, document.getElementById(id)))).then(() => result);
  }

  function ticks(method, low, high) {
    const at = new Map();
    const plain = { "zscore": [-1, 0, 1, 3, 10, 30, 100, 300, 1000, 3000, 1e4, 1e5, 1e6], "gain": [-30, -10, -3, -1, -0.3, 0, 0.3, 1, 3, 10, 30] }[method];
    if (plain) {
      for (const v of plain) at.set(Math.asinh(v), String(v).replace("-", "−"));
    } else if (method === "raw") {
      const step = Math.max(1, Math.ceil((high - low) / 7));
      for (let v = Math.ceil(low); v <= high; v += step) at.set(v, `10${superscript(v)}`);
    } else {
      for (let v = 0; v <= index.rare; v += 1) at.set(v, v === 0 ? "1" : `${v === index.rare ? "≤ " : ""}10${superscript(-v)}`);
    }
    return new Map([...at].filter(([v]) => v >= low - 1e-9 && v <= high + 1e-9));
  }

  function drawProfile(method) {
    const set = index.sets[state.set];
    const heights = unpack(shown.heights[method] || shown.heights.pot);
    const x = [], y = [], color = [], name = [], value = [];
    set.layers.forEach(([layer, stage, start], i) => {
      const end = i + 1 < set.layers.length ? set.layers[i + 1][2] : set.units;
      for (let unit = start; unit < end; unit += 1) {
        if (Number.isNaN(heights[unit])) continue;
        x.push(unit);
        y.push(heights[unit]);
        color.push(set.colors[stage]);
        name.push(`${T.filter(layer, unit - start)}, ${stage}`);
        const h = heights[unit];
        value.push(method === "zscore" ? `z ≈ ${short(Math.sinh(h))}` : method === "gain" ? `≈ ${short(Math.sinh(h))}` : method === "raw" ? `≈ ${short(10 ** h)}` : `p ≈ ${short(10 ** -h)}`);
      }
    });
    charts.dots.data = { x, y, color, name, value };
    const top = y.reduce((a, b) => Math.max(a, b), -Infinity), bottom = y.reduce((a, b) => Math.min(a, b), Infinity);
    const room = 0.06 * (top - bottom || 1);
    charts.profile.y_range.setv({ start: bottom - room, end: top + room });
    charts.profile.x_range.setv({ start: -0.01 * set.units, end: 1.01 * set.units });
    const marks = ticks(method, bottom - room, top + room), [axis] = charts.profile.left;
    axis.ticker = new Bokeh.FixedTicker({ ticks: [...marks.keys()] });
    axis.major_label_overrides = marks;
    axis.axis_label = T.axes[method];
    charts.profile.center[1].ticker = axis.ticker;
    charts.heights = heights;
  }

  /* ---- what is shown ---- */

  function change() {
    const wanted = index.sets[state.set].images[state.image].name;
    return load(wanted).then((content) => {
      if (index.sets[state.set].images[state.image].name !== wanted) return; // another one was chosen meanwhile
      shown = content;
      show();
    }, fail);
  }

  function show() {
    if (!shown || !charts) return;
    const set = index.sets[state.set], own = shown.methods[state.method], { k } = state;
    const about = set.images.find((image) => image.name === shown.name), what = reading(state.set, about);
    const at = set.elsewhere.filter((n) => n <= k).pop() || set.elsewhere[0], place = set.elsewhere.indexOf(at);
    const after = (edit) => ({
      guess: named(own[edit].predicted[k]), own: own[edit].true[k].toFixed(2),
      right: own[edit].predicted[k] === shown.label, stay: percent(own[edit].still_right[place]),
    });
    const result = {
      label: named(shown.label), guess: named(shown.predicted), view: T.views[about.view],
      own: shown.confidence[0].toFixed(2), was: shown.confidence[1].toFixed(2),
      significant: shown.significant, units: set.units.toLocaleString("en"), method: T.methods[state.method],
      k, at, retain: set.retain, finetune: after("finetune"), prune: after("prune"),
    };
    document.getElementById("pss-result").textContent = T.result(result);
    mount.dataset.shown = `${shown.name} ${state.method} ${k}`;
    showPictures(own, what);
    showProfile(own);
    showRepair(own, result);
    showTables(own);
  }

  function showPictures(own, what) {
    const picture = document.getElementById("pss-picture"), map = document.getElementById("pss-map");
    picture.src = shown.picture;
    picture.alt = T.pictureAlt(what);
    map.src = own.map;
    map.alt = T.mapAlt(what, T.methods[state.method]);
    mount.classList.toggle("pss-pixels", state.set === "digits");
  }

  function showProfile(own) {
    const drawn = `${shown.name} ${state.method}`, set = index.sets[state.set], first = own.top.slice(0, state.k);
    if (charts.drawn !== drawn) drawProfile(state.method);
    charts.drawn = drawn;
    charts.rings.data = { x: first, y: first.map((unit) => charts.heights[unit]) };
    const counts = new Map();
    for (const unit of first) counts.set(locate(unit).stage, (counts.get(locate(unit).stage) || 0) + 1);
    const listed = [...counts].map(([stage, n]) => `${stage} (${n})`).join(", ");
    document.getElementById("pss-profile").setAttribute("aria-label", T.profileAlt(state.k, listed));
    document.getElementById("pss-profile-title-note").textContent = T.profileNote[state.method];
    document.getElementById("pss-stages").replaceChildren(...Object.entries(set.colors).map(([stage, color]) =>
      make("span", {}, make("i", { style: `background:${color}`, "aria-hidden": "true" }), `${stage} (${counts.get(stage) || 0})`)));
  }

  function showRepair(own, result) {
    const steps = [...own.finetune.true.keys()], { k } = state;
    for (const span of charts.spans) span.location = k;
    const put = (key, x, y, look) => {
      charts.lines[key].source.data = { x, y };
      charts.lines[key].glyph.setv(look);
    };
    for (const [method, color] of Object.entries(index.methods)) {
      const mine = method === state.method, look = { line_color: color, line_width: mine ? 3.5 : 1, line_alpha: mine ? 1 : 0.75 };
      for (const edit of EDITS) {
        put(`${edit} ${method}`, steps, shown.methods[method][edit].true, look);
        put(`elsewhere ${edit} ${method}`, [0, ...index.sets[state.set].elsewhere], [1, ...shown.methods[method][edit].still_right], { ...look, line_dash: DASHES[edit] });
      }
    }
    for (const edit of EDITS) {
      put(`${edit} wrong`, steps, own[edit].wrong, { line_color: index.methods[state.method], line_width: 2, line_dash: [6, 4] });
      const text = T.curveAlt(T.edits[edit], result.label, own[edit].true[0].toFixed(2), result[edit].own, k);
      document.getElementById(`pss-${edit}`).setAttribute("aria-label", text);
    }
    document.getElementById("pss-elsewhere").setAttribute("aria-label", T.elsewhereAlt(result.at, result.finetune.stay, result.prune.stay));
    document.getElementById("pss-elsewhere-note").textContent = T.elsewhereNote(result.retain);
  }

  function fill(id, columns, rows) {
    const head = make("thead", {}, make("tr", {}, ...columns.map((text) => make("th", { scope: "col", text }))));
    const body = make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((text, i) => make(i ? "td" : "th", i ? { text } : { scope: "row", text })))));
    document.getElementById(id).replaceChildren(head, body);
  }

  function showTables(own) {
    const { k } = state;
    document.getElementById("pss-top-title").textContent = T.top(k);
    const ranked = state.method === "gain" ? T.axes.gain : T.columns.at(-1);
    fill("pss-top", [...T.columns.slice(0, -1), ranked], own.top.slice(0, k).map((unit, i) => {
      const { layer, stage, number } = locate(unit);
      return [i + 1, T.filter(layer, number), layer, stage, short(own.z[i]), before(own.log10_p[i]), short(own.saliency[i])];
    }));
    fill("pss-curves", T.curveColumns, [...Array(k + 1).keys()].map((n) =>
      [n, ...EDITS.flatMap((edit) => [named(own[edit].predicted[n]), own[edit].true[n].toFixed(3), own[edit].wrong[n].toFixed(3)])]));
  }

  function fail(error) {
    mount.replaceChildren(make("p", { role: "alert", text: error.message }));
  }

  mount.replaceChildren(make("p", { role: "status", text: T.loading }));
  load("index")
    .then((content) => {
      index = content;
      state.set = Object.keys(index.sets)[0];
      build();
      return script("vendor/bokeh.min.js").then(() => script("vendor/bokeh-api.min.js")).then(drawCharts);
    })
    .then((drawn) => { charts = drawn; return change(); })
    .catch(fail);
})();
