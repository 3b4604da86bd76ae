-- lags: what the server says that groups lag by, and what lies before them.
-- KEYS  1 stream
-- ARGV  1 most entries to count  2 most bytes of them, about  3.. groups
-- Returns per group {lag, entries}: lag is -1 if the server does not know; there are no more than so
--         many entries, exactly so many if they were few enough to be counted. {} for one that is
--         not there.
-- Atomic  because groups read on, and streams are trimmed, between two questions.
-- include _ids
local rows, answer, length = {}, {}, redis.call('XLEN', KEYS[1])
for _, flat in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local row = {}
  for i = 1, #flat, 2 do row[flat[i]] = flat[i + 1] end
  rows[row['name']] = row
end
-- What lies before any of them are the newest: they are read once for all groups.
local newest, oldest = {}, nil
if length > 0 then
  local size = 64
  for _, part in ipairs(redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1][2]) do
    size = size + #part
  end
  local most = math.min(tonumber(ARGV[1]) + 1, math.max(1, math.floor(tonumber(ARGV[2]) / size)))
  newest = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', most)
  oldest = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1][1]
end
for i = 3, #ARGV do
  local row, there = rows[ARGV[i]], 0
  answer[i - 2] = {}
  if row then
    local last = row['last-delivered-id']
    while there < #newest and before(last, newest[there + 1][1]) do there = there + 1 end
    if there == #newest and there < length then
      there = before(last, oldest) and length or length - 1
    end
    answer[i - 2] = {row['lag'] or -1, there}
  end
end
return answer
