CREATE TABLE schema_version (version integer NOT NULL);
INSERT INTO schema_version VALUES (0);

-- Every id that ever was: one never comes back.
CREATE TABLE session_ids (session_id text COLLATE "C" PRIMARY KEY);

-- digest: the SessionRow as JSON; the columns beside it are what is searched and compared.
CREATE TABLE sessions (
    session_id text COLLATE "C" PRIMARY KEY, user_id text COLLATE "C" NOT NULL,
    created_at timestamptz NOT NULL, epoch bigint NOT NULL, head bigint NOT NULL,
    closed boolean NOT NULL, n_open_turns bigint NOT NULL, digest text NOT NULL)
    WITH (fillfactor = 70);
CREATE INDEX sessions_by_owner ON sessions (user_id, created_at, session_id);
CREATE INDEX sessions_unrested ON sessions (created_at, session_id)
    WHERE n_open_turns > 0 AND NOT closed;

-- body is text: jsonb refuses \u0000 and rewrites numbers.
CREATE TABLE records (
    session_id text COLLATE "C", seq bigint, epoch bigint NOT NULL, at timestamptz NOT NULL,
    message_id text COLLATE "C", body text NOT NULL, PRIMARY KEY (session_id, seq));
CREATE UNIQUE INDEX commands ON records (session_id, message_id) WHERE message_id IS NOT NULL;

CREATE TABLE secrets (session_id text COLLATE "C" PRIMARY KEY, sealed bytea NOT NULL);

CREATE TABLE quota (
    user_id text COLLATE "C", quota_group text COLLATE "C", session_id text COLLATE "C",
    day date NOT NULL, PRIMARY KEY (user_id, quota_group, session_id));
CREATE INDEX quota_by_day ON quota (user_id, quota_group, day);

-- Functions where a lock must be held before the next statement looks: each statement of a
-- function sees what was committed before it, and no lock waits for an answer of ours.

CREATE FUNCTION delete_session(which text) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    PERFORM FROM sessions WHERE session_id = which FOR UPDATE;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    DELETE FROM records WHERE session_id = which;
    DELETE FROM secrets WHERE session_id = which;
    DELETE FROM sessions WHERE session_id = which;
    RETURN true;
END $$;

CREATE FUNCTION charge_quota(who text, which_group text, which text, on_day date, most bigint)
RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended(who || E'\n' || which_group, 0));
    PERFORM FROM quota WHERE user_id = who AND quota_group = which_group AND session_id = which;
    IF FOUND THEN
        RETURN true;
    END IF;
    IF (SELECT count(*) FROM quota
        WHERE user_id = who AND quota_group = which_group AND day = on_day) >= most THEN
        RETURN false;
    END IF;
    INSERT INTO quota VALUES (who, which_group, which, on_day);
    RETURN true;
END $$;
