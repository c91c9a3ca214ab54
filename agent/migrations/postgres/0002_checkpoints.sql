-- Derived from records: they may be deleted at any time.
CREATE TABLE checkpoints (
    session_id text COLLATE "C" PRIMARY KEY, seq bigint NOT NULL, code text NOT NULL,
    body text NOT NULL);

CREATE OR REPLACE FUNCTION delete_session(which text) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    PERFORM FROM sessions WHERE session_id = which FOR UPDATE;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    DELETE FROM records WHERE session_id = which;
    DELETE FROM checkpoints WHERE session_id = which;
    DELETE FROM secrets WHERE session_id = which;
    DELETE FROM sessions WHERE session_id = which;
    RETURN true;
END $$;
