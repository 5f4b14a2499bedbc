"""A recorded run as numbers, figures and a page; nothing here needs torch."""
