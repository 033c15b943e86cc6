"""agd.py becomes the package agd: type checkers read the hints of no module alone (PEP 561), and
pyproject.toml alone would put a copy into an editable install, which is the file itself."""

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class AsPackage(BuildHookInterface):
    def initialize(self, version, build_data):
        if version == "standard":
            build_data["force_include"] |= {"agd.py": "agd/__init__.py", "py.typed": "agd/py.typed"}
