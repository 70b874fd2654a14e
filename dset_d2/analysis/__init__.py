"""What a model costs: multiply-adds, activations, parameters and latency; what its experts do."""

from .experts import ExpertAnalysis, Objects, objects_of
from .flops import FlopReport, count_activations, count_flops
from .latency import Latency, device_name, measure, measure_modules
from .parameters import ParameterCount, count_parameters, deployed_parameters

__all__ = [
    "ExpertAnalysis",
    "FlopReport",
    "Latency",
    "Objects",
    "ParameterCount",
    "count_activations",
    "count_flops",
    "count_parameters",
    "deployed_parameters",
    "device_name",
    "measure",
    "measure_modules",
    "objects_of",
]
