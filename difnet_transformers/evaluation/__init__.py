"""Captioning and scoring of splits."""
