"""The command line, benchmarks and other tools."""
