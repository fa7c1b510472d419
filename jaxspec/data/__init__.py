"""Conversations and text into batches."""
