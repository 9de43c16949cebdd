SELECT app::text AS app, target::text AS target, referencing FROM ingest.find_references()
