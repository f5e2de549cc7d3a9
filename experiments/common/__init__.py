"""What experiments share: flags, records, runners, data, models, timing, processes and plots."""
