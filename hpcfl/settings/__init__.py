"""Settings: a job as data, with the meaning and the range of every key."""
