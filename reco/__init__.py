__version__ = "0.1.0"
METAFLOW_PACKAGE_POLICY = "include" # flows that run elsewhere take this package along
