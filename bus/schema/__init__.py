"""The schemas of all known events as files, and what a change of theirs breaks for whom.

    from bus.schema import check, export

    export("schemas")            # when an event is new or has changed; commit the files
    report = check("schemas")    # in CI, against the files of the released branch
    print(report)
    sys.exit(not report.ok)

See docs/evolution.md.
"""

from bus.schema.folder import Exported, check, export, schemas
from bus.schema.report import Finding, Report

__all__ = ["Exported", "Finding", "Report", "check", "export", "schemas"]
