"""Inference rules: statistics other than the running ones for batch norm in evaluation."""

from syncbn.inference.convert import revert_inference as revert_inference
from syncbn.inference.example_weighted import ExampleWeighted as ExampleWeighted
from syncbn.inference.example_weighted import convert_example_weighted as convert_example_weighted
from syncbn.inference.example_weighted import example_weighted as example_weighted
from syncbn.inference.prior_mix import PriorMix as PriorMix
from syncbn.inference.prior_mix import convert_prior_mix as convert_prior_mix
from syncbn.inference.prior_mix import prior_mix as prior_mix
