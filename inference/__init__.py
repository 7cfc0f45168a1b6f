"""How a guide is fitted, the posterior that comes out, and the harness that judges it."""
