"""One file per problem, each with ``make(T, dtype) -> Problem``. A new one is a new file and a line here."""

from benchmarks.problems import conv_anil, conv_warpgrad, conv_warpgrad_no_norm, sinusoid, transformer

PROBLEMS = {
    module.__name__.rsplit(".", 1)[1]: module
    for module in (sinusoid, conv_anil, conv_warpgrad, conv_warpgrad_no_norm, transformer)
}
