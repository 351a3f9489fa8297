"""The functional form, its autograd function and its composite formulas."""
