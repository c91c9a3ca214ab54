CREATE INDEX sessions_unrested ON sessions (created_at, session_id)
    WHERE n_open_turns > 0 AND closed = 0;
CREATE TABLE secrets (session_id TEXT PRIMARY KEY, sealed BLOB NOT NULL);
