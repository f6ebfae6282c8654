"""Readers for the three collections, and the tables and images that stages pass on."""
