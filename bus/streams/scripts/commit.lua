-- commit: apply effects, in one step with the acks of their deliveries, or once as a transaction.
-- KEYS  1 stream or inbox  2 dead letters; of a transaction 1 its memory; then all it touches
-- ARGV  1 group, '' for a transaction  2 consumer, or the transaction's sequence
--       3 seconds to remember a transaction
--       4 msgpack: {streams, units}. streams: {{stream, key of its overrun counts, events, keep,
--         slack, most, drop}, ...}; events: those without a condition, and one if there are others.
--         A unit is a delivery, or the transaction: {{entry id, attempt, id the entry had in its
--         stream, types, places, binaries, 1 if the last command is the mark of `once`}, commands}.
--         types: {key, type it must have if it exists, ...}. places: {command, stream to which it
--         appends, ...}. commands: {{tests, {name, key, ...}}, ...}. tests: {command, test, low,
--         high, ...}
--         5.. values that are no UTF-8, which msgpack cannot carry to Lua; binaries: {command,
--         place in it or, below 0, in its tests, which of them, ...}
-- Returns {{answer per delivery}, {stream, who pins it, ghosts, dropped, ...}, {stream, events
--         appended, ...}}. An answer is
--         1 done; 0 not this worker's any more, or done before: nothing was done;
--         {2, stream, who pins it} no room there: nothing was done;
--         {3, error, applied} a command failed: those before it stay, and the delivery is a dead
--         letter now, so that they are never applied again; {4, error} of a delivery: refused, and
--         nothing was done; {1, ran, replies} of a transaction.
--         ran, per command: 1 yes, 0 no, 2 yes, and its reply is a whole number written as text.
-- Error   STALE: a later batch of this sender was applied before. OOM, READONLY, ...: the server
--         takes no writes; NOPERM: the user may not, in a transaction. Nothing was done at all.
-- Atomic  because that is the promise.
-- include _owned
local group, owner, transaction = ARGV[1], ARGV[2], ARGV[1] == ''
local streams, units = unpack(cmsgpack.unpack(ARGV[4]))
for _, unit in ipairs(units) do
  local places, binaries, commands = unit[1][5], unit[1][6], unit[2]
  for k = 1, #places, 2 do commands[places[k]][2][2] = places[k + 1] end
  for k = 1, #binaries, 3 do
    local values = commands[binaries[k]][binaries[k + 1] < 0 and 1 or 2]
    values[math.abs(binaries[k + 1])] = ARGV[4 + binaries[k + 2]]
  end
end
if transaction then
  local memory = redis.call('GET', KEYS[1])
  if memory then
    local last, answer, large = unpack(cmsgpack.unpack(memory))
    if last == owner then
      for _, n in ipairs(large) do answer[3][n] = redis.pcall(unpack(units[1][2][n][2])) end
      return {{answer}, {}, {}}
    end
    if tonumber(owner) < tonumber(last) then
      return redis.error_reply('STALE transaction ' .. owner .. ', the last one was ' .. last)
    end
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
  for _, code in ipairs({'NOPERM ', 'ACL failure', "executing the script can't"}) do
    if transaction and string.find(err, code, 1, true) then return true end
  end
  return false
end

local function holds(reply, test, low, high)
  if reply == nil then return false end -- the command it is about was skipped
  if test == 'missing' then return not reply end
  if test == 'present' then return reply and true end
  if not reply then return false end
  if test == 'between' then
    if type(reply) == 'string' and string.find(reply, '[xX%s%z]') then return false end
    local n = tonumber(reply)
    return n and n >= tonumber(low) and n <= tonumber(high)
  end
  if type(reply) == 'table' then reply = reply['ok'] end
  if type(reply) == 'number' then reply = string.format('%.0f', reply) end
  return (reply == low) == (test == 'equals')
end

-- bury(id, attempt, origin, err, applied): the dead letter of a delivery that failed half way. The
-- limit on dead letters is no matter here: it must never run again by itself. If the key of the
-- dead letters is no stream, it stays pending in a lane that is never due.
local function bury(id, attempt, origin, err, applied)
  local entry = redis.call('XRANGE', KEYS[1], id, id)[1]
  local fields = entry and entry[2] or {}
  if string.sub(KEYS[1], -1) ~= '}' then
    -- Before `origentry`, if all but `run` follow it, is the entry's own.
    local added = {origentry = true, attempts = true, due = true, run = true}
    while added[fields[#fields - 1]] do
      local name = fields[#fields - 1]
      added[name] = nil
      fields[#fields] = nil
      fields[#fields] = nil
      if name == 'origentry' and not (added['attempts'] or added['due']) then break end
    end
  end
  if #fields > 2000 then fields = {'deadfields', cmsgpack.pack(fields)} end
  local time = redis.call('TIME')
  local why = {'deadreason', 'effects-failed', 'deaderror', 'EffectsFailed: ' .. err,
    'deadtraceback', '', 'deadattempts', attempt, 'deadentry', origin, 'deadapplied', applied,
    'deadtime', string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))}
  for _, part in ipairs(why) do fields[#fields + 1] = part end
  local added = redis.pcall('XADD', KEYS[2], '*', unpack(fields))
  if type(added) == 'table' then
    redis.call('XCLAIM', KEYS[1], group, 'parked:999999999999999', 0, id, 'JUSTID')
    return false
  end
  return true
end

local looked, rows, room, pins, broken = {}, {}, {}, {}, {}
local function look(row, total)
  local stream, overrun, keep, slack, most, drop = row[1], row[2], row[4], row[5], row[6], row[7]
  local length, found
  -- include _look
  if found then
    looked[#looked + 1] = stream
    for _, part in ipairs(found) do looked[#looked + 1] = part end
    pins[stream] = found[1]
  end
  room[stream] = most - length
end
for _, row in ipairs(streams) do
  local kind = redis.call('TYPE', row[1])['ok']
  if kind ~= 'none' and kind ~= 'stream' then
    broken[row[1]] = kind
  else
    rows[row[1]] = row
    look(row, row[3])
  end
end

-- full(places, commands) -> answer if there is no room for all these events, else nil. Then it is
-- taken by those without a condition; the others may not come, and take theirs when they do. Where
-- the oldest give way, they do so when it was needed.
local function full(places, commands)
  local need = {}
  for i = 1, #places, 2 do
    local stream = places[i + 1]
    need[stream] = (need[stream] or 0) + 1
    if need[stream] > room[stream]
        and (rows[stream][7] ~= '1' or #commands[places[i]][1] == 0) then
      return {2, stream, pins[stream] or {}}
    end
  end
  for i = 1, #places, 2 do
    if #commands[places[i]][1] == 0 then room[places[i + 1]] = room[places[i + 1]] - 1 end
  end
end

-- mistyped(types, places) -> what is wrong with the types of keys, else nil.
local function mistyped(types, places)
  for i = 1, #types, 2 do
    local kind = redis.call('TYPE', types[i])['ok']
    if kind ~= 'none' and kind ~= types[i + 1] then
      return 'WRONGTYPE ' .. types[i] .. ' is a ' .. kind .. ', not a ' .. types[i + 1]
    end
  end
  for i = 2, #places, 2 do
    if broken[places[i]] then
      return 'WRONGTYPE ' .. places[i] .. ' is a ' .. broken[places[i]] .. ', not a stream'
    end
  end
end

local mine = transaction
if not transaction then
  local ids = {}
  for i, unit in ipairs(units) do ids[i] = unit[1][1] end
  mine = owned(KEYS[1], group, owner, ids)
end
local answers, done, added = {}, {}, {}
for i, unit in ipairs(units) do
  local id, attempt, origin, types, places, _, marked = unpack(unit[1])
  local commands = unit[2]
  local answer = 0
  if transaction or mine[id] then
    local wrong = mistyped(types, places)
    answer = not wrong and full(places, commands) or nil
    if not answer then
      local replies, ran, applied = {}, {}, {}
      for n, command in ipairs(wrong and {} or commands) do
        local tests, args = command[1], command[2]
        local met = true
        for t = 1, #tests, 4 do
          met = met and holds(replies[tests[t]], tests[t + 1], tests[t + 2], tests[t + 3])
        end
        if met then
          local reply = redis.pcall(unpack(args))
          if type(reply) == 'table' and reply['err'] then
            if unwritten(reply['err']) then return reply end
            wrong = args[1] .. ' ' .. args[2] .. ': ' .. reply['err']
            break
          end
          ran[n] = 1
          if type(reply) == 'number' and math.abs(reply) > 9007199254740991 then
            -- Only counters get so far, and a script's numbers do not: the server has it as text.
            local exact = args[1] == 'INCRBY' and redis.pcall('GET', args[2])
              or redis.pcall('HGET', args[2], args[3])
            if type(exact) == 'string' then reply, ran[n] = exact, 2 end
          end
          replies[n] = reply
          if not reads[args[1]] then
            wrote = true
            if args[1] == 'XADD' then
              added[args[2]] = (added[args[2]] or 0) + 1
              if #tests > 0 then room[args[2]] = room[args[2]] - 1 end
            end
            applied[#applied + 1] = args[1] .. ' ' .. args[2]
          end
        else
          ran[n] = 0
        end
      end
      if not wrong then
        answer = 1
        done[#done + 1] = id
      elseif #applied == 0 and not transaction then
        answer = {4, wrong}
      else
        local stays = string.sub(table.concat(applied, '\n'), 1, 8000)
        answer = {3, string.sub(wrong, 1, 2000), stays}
        if not transaction then
          if marked then redis.pcall(unpack(commands[#commands][2])) end
          if bury(id, attempt, origin, answer[2], stays) then done[#done + 1] = id end
        end
      end
      if transaction and not wrong then
        for n = 1, #commands do
          if replies[n] == nil then replies[n] = false end
        end
        answer = {1, ran, replies}
      elseif not transaction then
        mine[id] = nil
      end
    end
  end
  answers[i] = answer
end
for stream, row in pairs(rows) do
  if room[stream] < 0 and row[7] == '1' then look(row, 0) end
end
if transaction and wrote then
  local answer, kept, large = answers[1], {}, {}
  for n, reply in ipairs(answer[1] == 1 and answer[3] or {}) do
    kept[n] = reply
    -- What was read is not ours to keep for long: a repeat reads it again.
    if type(reply) == 'string' and #reply > 1000 then kept[n], large[#large + 1] = false, n end
  end
  if answer[1] == 1 then answer = {1, answer[2], kept} end
  redis.call('SET', KEYS[1], cmsgpack.pack({owner, answer, large}), 'EX', ARGV[3])
elseif not transaction and #done > 0 then
  finish(KEYS[1], group, done)
end
local appended = {}
for stream, events in pairs(added) do
  appended[#appended + 1] = stream
  appended[#appended + 1] = events
end
return {answers, looked, appended}
