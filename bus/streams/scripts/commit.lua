-- commit: apply effects, in one step with the acks of their deliveries, or once as a transaction.
-- KEYS  1 stream or inbox  2 dead letters; of a transaction 1 its memory; then all it touches
-- ARGV  1 group, '' for a transaction  2 consumer, or the transaction's sequence
--       3 seconds to remember a transaction
--       then per delivery (a transaction is one): entry id, number of arguments of it, attempt,
--         id the entry had in its stream,
--         number of keys to check; key, type it must have if it exists, ...
--         number of streams; stream, key of its overrun counts, events, keep, slack, most, drop, ...
--         number of commands; per command: number of tests, {command, test, low, high}, ...,
--         number of arguments, name, key, ...
-- Returns {{answer per delivery}, {stream, who pins it, ghosts, dropped, ...}, {stream, events
--         appended, ...}}. An answer is
--         1 done; 0 not this worker's any more, or done before: nothing was done;
--         {2, stream, who pins it} no room there: nothing was done;
--         {3, error, applied} a command failed: those before it stay, and the delivery is a dead
--         letter now, so that they are never applied again; {1, ran, replies} of a transaction.
-- Error   STALE: a later batch of this sender was applied before. OOM, READONLY, ...: the server
--         takes no writes, nothing was done at all.
-- Atomic  because that is the promise.
-- include _owned
local group, owner, transaction = ARGV[1], ARGV[2], ARGV[1] == ''
if transaction then
  local memory = redis.call('GET', KEYS[1])
  if memory then
    local last = cmsgpack.unpack(memory)
    if last[1] == owner then return {{last[2]}, {}, {}} end
    if tonumber(owner) < tonumber(last[1]) then
      return redis.error_reply('STALE transaction ' .. owner .. ', the last one was ' .. last[1])
    end
  end
end

-- Nothing may go wrong with a dead letter once effects were applied.
if not transaction then
  local kind = redis.call('TYPE', KEYS[2])['ok']
  if kind ~= 'none' and kind ~= 'stream' then
    return redis.error_reply('WRONGTYPE ' .. KEYS[2] .. ' is a ' .. kind)
  end
end

local reads = {GET = true, HGET = true, SISMEMBER = true, SCARD = true, ZSCORE = true,
  ZCARD = true, EXISTS = true}
local wrote = false -- a server that takes no writes says so at the first one
local function unwritten(err)
  if wrote then return false end
  for _, code in ipairs({'OOM ', 'READONLY ', 'MISCONF ', 'NOREPLICAS '}) do
    if string.find(err, code, 1, true) then return true end
  end
  return false
end

local function holds(reply, test, low, high)
  if reply == nil then return false end -- the command it is about was skipped
  if test == 'missing' then return not reply end
  if test == 'present' then return reply and true end
  if not reply then return false end
  if test == 'between' then
    local n = tonumber(reply)
    return n and n >= tonumber(low) and n <= tonumber(high)
  end
  if type(reply) == 'table' then reply = reply['ok'] end
  if type(reply) == 'number' then reply = string.format('%.0f', reply) end
  return (reply == low) == (test == 'equals')
end

-- bury(id, attempt, origin, err, applied): the dead letter of a delivery that failed half way. The
-- limit on dead letters is no matter here: it must never run again by itself.
local function bury(id, attempt, origin, err, applied)
  local entry = redis.call('XRANGE', KEYS[1], id, id)[1]
  local fields = entry and entry[2] or {}
  if string.sub(KEYS[1], -1) ~= '}' then
    local own = {origentry = true, attempts = true, due = true, run = true}
    while own[fields[#fields - 1]] do
      own[fields[#fields - 1]] = nil
      fields[#fields] = nil
      fields[#fields] = nil
    end
  end
  if #fields > 2000 then fields = {'deadfields', cmsgpack.pack(fields)} end
  local time = redis.call('TIME')
  local why = {'deadreason', 'effects-failed', 'deaderror', 'EffectsFailed: ' .. err,
    'deadtraceback', '', 'deadattempts', attempt, 'deadentry', origin, 'deadapplied', applied,
    'deadtime', string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))}
  for _, part in ipairs(why) do fields[#fields + 1] = part end
  redis.call('XADD', KEYS[2], '*', unpack(fields))
end

local ids, starts, last = {}, {}, #ARGV
local at = 4
while at <= last do
  ids[#ids + 1] = ARGV[at]
  starts[#starts + 1] = at + 2
  at = at + 2 + tonumber(ARGV[at + 1])
end
local mine = transaction or owned(KEYS[1], group, owner, ids)
local answers, looked, done, added = {}, {}, {}, {}
for i, id in ipairs(ids) do
  local answer = 0
  if transaction or mine[id] then
    at = starts[i]
    local attempt, origin = ARGV[at], ARGV[at + 1]
    at = at + 2
    local wrong, full
    local n = tonumber(ARGV[at])
    at = at + 1
    for _ = 1, n do
      local kind = redis.call('TYPE', ARGV[at])['ok']
      if not wrong and kind ~= 'none' and kind ~= ARGV[at + 1] then
        wrong = 'WRONGTYPE ' .. ARGV[at] .. ' is a ' .. kind .. ', not a ' .. ARGV[at + 1]
      end
      at = at + 2
    end
    n = tonumber(ARGV[at])
    at = at + 1
    for _ = 1, n do
      local stream, overrun, drop = ARGV[at], ARGV[at + 1], ARGV[at + 6]
      local total, keep = tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3])
      local slack, most = tonumber(ARGV[at + 4]), tonumber(ARGV[at + 5])
      local length, found
      if not wrong and not full then
        local kind = redis.call('TYPE', stream)['ok']
        if kind ~= 'none' and kind ~= 'stream' then
          wrong = 'WRONGTYPE ' .. stream .. ' is a ' .. kind .. ', not a stream'
        else
          -- include _look
          if found then
            looked[#looked + 1] = stream
            for _, part in ipairs(found) do looked[#looked + 1] = part end
          end
          if length + total > most then full = {2, stream, found and found[1] or {}} end
        end
      end
      at = at + 7
    end
    if full then
      answer = full
    else
      local replies, ran, applied = {}, {}, {}
      n = tonumber(ARGV[at])
      at = at + 1
      for command = 1, wrong and 0 or n do
        local met = true
        for _ = 1, tonumber(ARGV[at]) do
          if met and not holds(replies[tonumber(ARGV[at + 1])],
              ARGV[at + 2], ARGV[at + 3], ARGV[at + 4]) then met = false end
          at = at + 4
        end
        at = at + 1
        local arguments = tonumber(ARGV[at])
        if met then
          local reply = redis.pcall(unpack(ARGV, at + 1, at + arguments))
          if type(reply) == 'table' and reply['err'] then
            if unwritten(reply['err']) then return reply end
            wrong = ARGV[at + 1] .. ' ' .. ARGV[at + 2] .. ': ' .. reply['err']
            break
          end
          replies[command] = reply
          if not reads[ARGV[at + 1]] then
            wrote = true
            if ARGV[at + 1] == 'XADD' then added[ARGV[at + 2]] = (added[ARGV[at + 2]] or 0) + 1 end
            applied[#applied + 1] = ARGV[at + 1] .. ' ' .. ARGV[at + 2]
          end
        end
        ran[command] = met and 1 or 0
        at = at + arguments + 1
      end
      if wrong then
        answer = {3, wrong, table.concat(applied, '\n')}
        if not transaction then bury(id, attempt, origin, wrong, answer[3]) end
      elseif transaction then
        for command = 1, n do
          if replies[command] == nil then replies[command] = false end
        end
        answer = {1, ran, replies}
      else
        answer = 1
      end
      if not transaction then done[#done + 1] = id end
    end
  end
  answers[i] = answer
end
if #done > 0 then finish(KEYS[1], group, done) end
if transaction and answers[1][1] ~= 2 then
  redis.call('SET', KEYS[1], cmsgpack.pack({owner, answers[1]}), 'EX', ARGV[3])
end
local appended = {}
for stream, events in pairs(added) do
  appended[#appended + 1] = stream
  appended[#appended + 1] = events
end
return {answers, looked, appended}
