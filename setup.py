"""Packaging. Every fact comes from settings.ini, which nbdev reads as well."""
from configparser import ConfigParser
from pathlib import Path
from shlex import split

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
PACKAGE_FILES = ["**/*.js", "**/*.css", "**/*.json", "**/*.j2", "**/*.html", "**/*.ipynb"]

settings = ConfigParser(delimiters=["="])
settings.read(ROOT / "settings.ini", encoding="utf-8")
facts = settings["DEFAULT"]
package = facts["lib_path"]
suffix = "_requirements"

setup(
    name=facts["lib_name"],
    version=facts["version"],
    description=facts["description"],
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author=facts["author"],
    author_email=facts["author_email"],
    url=facts["git_url"],
    license="Apache-2.0",
    keywords=facts["keywords"].split(),
    python_requires=f">={facts['min_python']}",
    packages=find_packages(include=[package, f"{package}.*"]),
    package_data={package: PACKAGE_FILES},
    install_requires=split(facts["requirements"]),
    extras_require={key.removesuffix(suffix): split(value) for key, value in facts.items() if key.endswith(suffix)},
    entry_points={"console_scripts": split(facts["console_scripts"]), "nbdev": [f"{package}={package}._modidx:d"]},
    zip_safe=False,
)
