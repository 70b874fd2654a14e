"""What a model costs: multiply-adds, activations, parameters and latency."""

from .flops import FlopReport, count_activations, count_flops
from .latency import Latency, device_name, measure, measure_modules
from .parameters import ParameterCount, count_parameters, deployed_parameters

__all__ = [
    "FlopReport",
    "Latency",
    "ParameterCount",
    "count_activations",
    "count_flops",
    "count_parameters",
    "deployed_parameters",
    "device_name",
    "measure",
    "measure_modules",
]
