"""What is believed before the data: backbone, adapter sites, priors, likelihood and tasks."""
