"""What the last notebooks, the site and the command line call: reports, experiments, sweeps, the explorer."""
