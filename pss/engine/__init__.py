"""How gradients of each sample and tail fits are computed: torch alone, no idea of the papers."""
