"""What the scripts share: entry point, configuration, figures and output."""
