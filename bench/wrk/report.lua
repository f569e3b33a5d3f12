-- Loaded by wrk, see wrk.go. The first argument after "--", if there is one, is a
-- request head in which "{uuid}" stands for an ID that differs in each request.

local distinct = 4096 -- formatted before the start, so that Lua is not what is measured

local function uuid()
  return (string.gsub("xxxxxxxx-xxxx-4xxx-8xxx-xxxxxxxxxxxx", "x", function()
    return string.format("%x", math.random(0, 15))
  end))
end

function init(args)
  local head = args[1]
  if not head then
    return
  end
  math.randomseed(os.time())
  local requests = {}
  for i = 1, distinct do
    requests[i] = string.gsub(head, "{uuid}", uuid)
  end
  local i = 0
  function request()
    i = i % distinct + 1
    return requests[i]
  end
end

-- wrk itself prints neither the 99.9th percentile nor how many requests it counted.
function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '\nreport: {"requests":%d,"duration_us":%d,"p50_us":%d,"p99_us":%d,"p999_us":%d,"failed":%d}\n',
    summary.requests, summary.duration,
    latency:percentile(50), latency:percentile(99), latency:percentile(99.9),
    errors.connect + errors.read + errors.write + errors.status + errors.timeout
  ))
end
