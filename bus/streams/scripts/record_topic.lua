-- record_topic: write what is known of a topic unless somebody wrote meanwhile.
-- KEYS  1 bus:topics
-- ARGV  1 topic  2 value expected, '' for none  3 new value
-- Returns the value that stands now, '' for none.
-- Atomic  because two first users must agree.
local now = redis.call('HGET', KEYS[1], ARGV[1]) or ''
if now ~= ARGV[2] then return now end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
return ARGV[3]
