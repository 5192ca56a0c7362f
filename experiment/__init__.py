"""What all scripts share: results on disk, options and worker processes, statistics, plots."""
