"""The suites that ship with the package, as YAML files."""
