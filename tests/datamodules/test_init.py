"""The package itself: names are there at once, frameworks only when one is asked for."""

import subprocess
import sys


def test_the_package_imports_no_framework_until_asked():
    code = (
        "import sys, datamodules; assert not {'torch', 'lightning', 'transformers', 'datasets'} & set(sys.modules);"
        "assert 'TextDataModule' in dir(datamodules); datamodules.NoSuch"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(
        "AttributeError: module 'datamodules' has no attribute 'NoSuch'; it has "
    )
