"""Run the Storage server: `python -m embedded_supabase.storage --root DIR --secret-file FILE`."""

import sys

from embedded_supabase.storage.server import main

if __name__ == "__main__":
    sys.exit(main())
