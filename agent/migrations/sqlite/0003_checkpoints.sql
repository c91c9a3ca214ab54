CREATE TABLE checkpoints (
    session_id TEXT PRIMARY KEY, seq INTEGER NOT NULL, code TEXT NOT NULL, body TEXT NOT NULL);
