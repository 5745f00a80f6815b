"""scripts/lib/postgres.sh, with a stand-in for what needs root and for apt."""

import pytest

from tests.scripts.shell import bash

STAND_INS = """
as_root() {{ echo "root: $*" >&2; [[ $1 != tee ]] || cat >&2; }}
apt_install() {{ echo "apt: $*" >&2; {apt}; }}
compgen() {{ {found}; }}
ensure_postgres
echo done
"""


def ensure(*, found: str, apt: str = "true"):
    return bash(STAND_INS.format(found=found, apt=apt), libraries=("common", "postgres"))


def test_what_is_there_is_not_installed():
    done = ensure(found="true")
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.parametrize(("apt", "returncode"), [("true", 0), ("exit 3", 3)])
def test_it_is_installed_without_a_server_of_debians_own(apt, returncode):
    done = ensure(found="false", apt=apt)
    settings = "/etc/postgresql-common/createcluster.d/e80.conf"
    assert done.returncode == returncode
    assert done.stderr.splitlines() == [
        "root: mkdir -p /etc/postgresql-common/createcluster.d",
        f"root: tee {settings}",
        "create_main_cluster = false",
        "apt: postgresql",
        f"root: rm -f {settings}",
    ]
