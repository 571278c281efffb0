"""What a patch reads: second moments of its modules' inputs, and the filter that closes it to some of them."""

from sst_kernels.inputs.filter import MUS, Basis, basis_of, filter_inputs
from sst_kernels.inputs.moments import InputMoments, input_moments

__all__ = ["MUS", "Basis", "InputMoments", "basis_of", "filter_inputs", "input_moments"]
