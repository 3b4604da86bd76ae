-- remove_group: delete a group of one stream, with everything that is its own.
-- KEYS  1 stream  2 inbox  3 dead letters  4 counts of what it was overrun by
-- ARGV  1 group
-- Returns 1, 0 if there was no such group.
-- Atomic  because what was the group's must not be found without it.
local found, made = redis.call('EXISTS', KEYS[1]) == 1, nil
if found then
  -- What forbids the last of the writes says so before the first. Making needs the same right as
  -- destroying, and memory, which is no matter here; the group may exist.
  made = redis.pcall('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0')
  local refused = made['err']
  if refused and not string.find(refused, 'BUSYGROUP', 1, true)
    and not string.find(refused, 'OOM', 1, true) then return made end
end
redis.call('HDEL', KEYS[4], '') -- likewise
redis.call('UNLINK', KEYS[2], KEYS[3])
redis.call('HDEL', KEYS[4], ARGV[1])
if not found then return 0 end
local gone = redis.call('XGROUP', 'DESTROY', KEYS[1], ARGV[1])
return made['err'] and gone or 0
