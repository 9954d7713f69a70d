"""Adoption of networks that another library trained: from their files to a step directory (`starseg adopt`)."""
