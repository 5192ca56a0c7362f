"""What every script shares: files, launch, statistics, plots. It knows nothing of networks."""
