-- room: trim a stream, and say how much would fit, without sending events.
-- KEYS  1 stream
-- ARGV  1 keep  2 most entries  3 entries that are to fit, 0 to trim whole nodes only
-- Returns {room, who pins it as {group, floor, pending, lag}, lost as {group, id, ...}}.
-- Atomic  because what is trimmed must still be needed by nobody when it goes.
-- include _trim
local length = redis.call('XLEN', KEYS[1])
if length == 0 then return {tonumber(ARGV[2]), {}, {}} end
local who, lost, floor
length, who, lost, floor = trim(KEYS[1], tonumber(ARGV[1]), length,
  length + tonumber(ARGV[3]) - tonumber(ARGV[2]), tonumber(ARGV[3]))
return {tonumber(ARGV[2]) - length, pinned_by(who, floor), lost}
