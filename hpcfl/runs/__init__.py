"""One run in one folder: launched, recorded, checkpointed, stopped and watched."""
