-- release: let any worker take pending entries now that wait in a lane, or are a dead worker's.
-- KEYS  1 stream  2 the lease of the owner
-- ARGV  1 group  2 owner  3.. ids
-- Returns per entry 1, 0 if it is not the owner's any more or the owner lives, -1 if its entry is
--         gone: then it was acked.
-- They go to a lane that is due. Its count stays: taking it raises it, so the next attempt follows
-- on those that were used up. A lane left empty is deleted.
-- Atomic  because a worker may be taking the same entry, or come back to life.
-- include _owned
local answer, ids = {}, {unpack(ARGV, 3)}
if redis.call('EXISTS', KEYS[2]) == 1 then
  for i in ipairs(ids) do answer[i] = 0 end
  return answer
end
local time = redis.call('TIME')
local due = string.format('parked:%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
local theirs = owned(KEYS[1], ARGV[1], ARGV[2], ids)
for i, id in ipairs(ids) do
  if not theirs[id] then
    answer[i] = 0
  elseif #redis.call('XRANGE', KEYS[1], id, id) == 0 then
    redis.call('XACK', KEYS[1], ARGV[1], id)
    answer[i] = -1
  else
    redis.call('XCLAIM', KEYS[1], ARGV[1], due, 0, id, 'RETRYCOUNT', theirs[id], 'JUSTID')
    answer[i] = 1
  end
end
if string.sub(ARGV[2], 1, 7) == 'parked:' then drop_if_empty(KEYS[1], ARGV[1], ARGV[2]) end
return answer
