CREATE TABLE schema_version (version INTEGER NOT NULL);
INSERT INTO schema_version VALUES (0);
CREATE TABLE sessions (
    session_id TEXT PRIMARY KEY, user_id TEXT NOT NULL, agent TEXT NOT NULL, title TEXT,
    model TEXT NOT NULL, created_at TEXT NOT NULL, updated_at TEXT NOT NULL, epoch INTEGER NOT NULL,
    head INTEGER NOT NULL, closed INTEGER NOT NULL, n_open_turns INTEGER NOT NULL,
    n_messages INTEGER NOT NULL, pending TEXT NOT NULL, usage TEXT NOT NULL,
    spend_usd REAL NOT NULL, n_unpriced INTEGER NOT NULL);
CREATE INDEX sessions_by_owner ON sessions (user_id, created_at, session_id);
CREATE TABLE records (
    session_id TEXT NOT NULL, seq INTEGER NOT NULL, epoch INTEGER NOT NULL, at TEXT NOT NULL,
    message_id TEXT, body TEXT NOT NULL, PRIMARY KEY (session_id, seq));
CREATE UNIQUE INDEX commands ON records (session_id, message_id) WHERE message_id IS NOT NULL;
CREATE TABLE deleted (session_id TEXT PRIMARY KEY);
CREATE TABLE quota (
    user_id TEXT NOT NULL, quota_group TEXT NOT NULL, session_id TEXT NOT NULL, day TEXT NOT NULL,
    PRIMARY KEY (user_id, quota_group, session_id));
CREATE INDEX quota_by_day ON quota (user_id, quota_group, day);
