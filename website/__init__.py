"""The documentation's web site: pages gathered from the repository, built, and looked at."""
