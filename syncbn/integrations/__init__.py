"""Plugins and callbacks of trainers; each module needs its trainer."""
