-- replay: copy entries of a stream into the inbox of one group, each once per run.
-- KEYS  1 stream  2 the group's inbox  3 the run's memory for this stream
-- ARGV  1 group  2 run  3 most entries of the inbox  4 seconds to remember
--       5 the last id that the caller knows the memory to hold, '' for none  6.. entry ids, rising
-- Returns {copied, gone, 1 if the inbox is full, copied by this run in all, last id in the memory},
--         or {-1} if the memory is older than the caller knows, or not there: nothing was done. Ids
--         up to the one in the memory were copied before and are passed over. gone: trimmed or
--         deleted meanwhile.
-- Atomic  because a repeat, after a lost answer or by another process, must find in the memory
--         exactly what is in the inbox.
-- include _ids
local memory = redis.call('GET', KEYS[3])
local last, total = nil, 0
if memory then
  last, total = string.match(memory, '^(%S+) (%d+)$')
  total = tonumber(total)
end
if ARGV[5] ~= '' and (not last or before(last, ARGV[5])) then return {-1} end
local room = tonumber(ARGV[3]) - redis.call('XLEN', KEYS[2])
local copied, gone, full, begun = 0, 0, 0, false
for i = 6, #ARGV do
  local id = ARGV[i]
  if not last or before(last, id) then
    if copied >= room then
      full = 1
      break
    end
    if not begun then
      -- Whatever forbids one of the writes says so before the first entry is copied.
      begun = true
      redis.call('SET', KEYS[3], memory or '0-0 0', 'EX', ARGV[4])
      local made = redis.pcall('XGROUP', 'CREATE', KEYS[2], ARGV[1], '0', 'MKSTREAM')
      if made['err'] and not string.find(made['err'], 'BUSYGROUP', 1, true) then return made end
    end
    local entry = redis.call('XRANGE', KEYS[1], id, id)[1]
    if entry then
      local fields = entry[2]
      for _, word in ipairs({'origentry', id, 'attempts', '0', 'due', '0', 'run', ARGV[2]}) do
        fields[#fields + 1] = word
      end
      redis.call('XADD', KEYS[2], '*', unpack(fields))
      copied = copied + 1
    else
      gone = gone + 1
    end
    last = id
  end
end
if copied + gone > 0 then
  redis.call('SET', KEYS[3], last .. ' ' .. string.format('%.0f', total + copied), 'EX', ARGV[4])
end
return {copied, gone, full, total + copied, last or ''}
