"""Modules: the layer, its lazy form, conversion of models, accumulation of statistics."""
