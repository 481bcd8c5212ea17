"""Programs that train, evaluate and measure, and the packages that they share. They run from a checkout."""
