"""Tables of the tool environment: names of tools, names of things, and how requests are worded, in English and Korean. No logic.

A word, a wording or a tool's name is either trained on or held out; data/episodes.py says which split sees what.
"""
import re
import zlib

# Per family of data/tools.py, its tools in the order of that file: each a name, then names for its parameters. Three lines to train on,
# then two that are held out. No name of a tool or a parameter is in both.
STYLES = {family: [[tuple(tool.split()) for tool in line.split("|")] for line in text.strip().splitlines()] for family, text in {
    "calc": """calculator expression
               compute formula
               math_eval input
               arithmetic problem
               number_machine term""",
    "python": """python code
                 run_python source
                 execute_script script
                 py_interpreter program
                 snippet_runner snippet""",
    "sql": """sql query
              run_sql statement
              db_query sql_text
              database command
              table_engine instruction""",
    "search": """search query | open id
                 find_documents words | read_document doc
                 wiki_search text | wiki_page page_id
                 lookup_articles terms | show_article article
                 archive_find topic | archive_fetch reference""",
    "kv": """kv_get key | kv_set key value | kv_delete key | kv_add key amount | kv_list prefix
             read_entry name | write_entry name content | remove_entry name | increase_entry name by | list_entries start
             store_load entry | store_save entry data | store_drop entry | store_bump entry step | store_scan begins_with
             memory_recall label | memory_keep label item | memory_forget label | memory_raise label delta | memory_labels stem
             registry_fetch slot | registry_put slot setting | registry_erase slot | registry_plus slot increment | registry_browse head""",
    "file": """file_read path | file_write path text | file_delete path | file_list prefix
               cat file | save file body | rm file | ls beginning
               get_file filename | put_file filename contents | drop_file filename | find_files starts_with
               open_text document | store_text document payload | erase_text document | index_texts lead
               disk_fetch location | disk_put location new_text | disk_wipe location | disk_names opening""",
    "calendar": """calendar_list day | calendar_add day hour title | calendar_move id day hour | calendar_cancel id
                   show_day weekday | book_slot weekday time heading | shift_booking booking weekday time | free_slot booking
                   agenda_view date | agenda_create date at what | agenda_change event date at | agenda_remove event
                   diary_look when | diary_enter when oclock subject | diary_shift entry_id when oclock | diary_strike entry_id
                   planner_day on | planner_put on start_hour meeting | planner_push number on start_hour | planner_clear number""",
}.items()}

# -----------------------------------------------------------------------------
# Names of things

_WORDS = {
    "en": ("""amber bright calm dusty eager frozen gentle hidden ivory jolly keen lucky mellow noble olive proud quiet rapid silver tidy urban
              violet warm young zesty brave copper distant early faint golden hollow inner jagged light marble narrow open plain rustic""",
           """anchor bridge castle desert engine forest garden harbor island jacket kettle lantern meadow needle orchard palace quarry river
              saddle temple umbrella valley window yard bakery canyon dagger eagle fountain glacier hammer inlet jewel kiosk ladder mirror
              notebook oven pillow rocket"""),
    "ko": ("""푸른 붉은 하얀 검은 노란 작은 커다란 조용한 빠른 느린 밝은 어두운 따뜻한 차가운 둥근 네모난 오래된 새로운 먼 가까운 깊은 얕은 높은 낮은
              달콤한 매운 굵은 가는 젖은 마른 무거운 가벼운 맑은 흐린 단단한 부드러운 넓은 좁은 용감한 게으른""",
           """등대 다리 성곽 사막 엔진 숲 정원 항구 섬 외투 주전자 등불 초원 바늘 과수원 궁전 채석장 강 안장 사원 우산 골짜기 창문 마당 빵집 협곡
              망치 독수리 분수 빙하 보석 매점 사다리 거울 공책 화덕 베개 로켓 나침반 시계탑"""),
}
NAMES = {lang: ([], []) for lang in _WORDS}  # to train on, held out: one in five
for _lang, (_adjectives, _nouns) in _WORDS.items():
    for _name in (f"{a} {n}" for a in _adjectives.split() for n in _nouns.split()):
        NAMES[_lang][zlib.crc32(_name.encode()) % 5 == 0].append(_name)
DAY_NAMES = {"en": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(), "ko": "월요일 화요일 수요일 목요일 금요일 토요일 일요일".split()}
ARTICLE = {"en": ("{name} station", "The {name} station opened in {year} and has {gates} gates. Its keeper is {keeper}. Its access code is {code}."),
            "ko": ("{name} 역", "{name} 역은 {year}년에 문을 열었고 문이 {gates}개 있다. 관리자는 {keeper}이다. 출입 코드는 {code}이다.")}

# -----------------------------------------------------------------------------
# Wordings, between slashes: two to train on, then the one that is held out. Each says which store it is about, since level 6 asks for
# things in stores that no offered tool sees.

_TEXT = """
kv_get: What does the store hold under '{key}'? / Look up the key '{key}' in the store. / I need whatever the store keeps for '{key}'.
    저장소의 '{key}' 키에는 무엇이 있나요? / 저장소에서 '{key}' 키를 찾아 주세요. / 저장소가 '{key}' 키로 보관하는 값이 필요합니다.
kv_set: Set '{key}' in the store to '{value}' and tell me what it held before.
    / Write '{value}' under '{key}' in the store. What was there until now?
    / The store's entry '{key}' has to become '{value}'; I also want to hear its old value.
    저장소의 '{key}' 값을 '{value}'(으)로 바꾸고 이전 값을 알려 주세요. / 저장소의 '{key}' 키에 '{value}'(을)를 써 주세요. 지금까지는 무엇이었나요?
    / 저장소 항목 '{key}' 자리에 이제 '{value}'(이)가 있어야 합니다. 옛 값도 말해 주세요.
kv_delete: Delete '{key}' from the store and tell me its last value. / Remove the key '{key}' from the store. What did it hold?
    / The store can do without '{key}': drop it and report the value that goes with it.
    저장소에서 '{key}' 키를 지우고 마지막 값을 알려 주세요. / 저장소의 '{key}' 키를 삭제해 주세요. 값이 무엇이었나요?
    / 저장소에 '{key}' 항목은 더 필요 없으니 없애고, 함께 사라진 값을 보고해 주세요.
kv_add: Add {amount} to the number under '{key}' in the store. What is it now?
    / Raise '{key}' in the store by {amount} and tell me the new number.
    / The store's counter '{key}' goes up by {amount}; where does it stand then?
    저장소의 '{key}' 수에 {amount}(을)를 더해 주세요. 이제 얼마인가요? / 저장소의 '{key}' 값을 {amount}만큼 올리고 새 값을 알려 주세요.
    / 저장소 계수기 '{key}' 항목이 {amount} 늘어납니다. 그러면 몇이 되나요?
file_read: What does the file {path} say? / Read me the file {path}. / I would like to know what is written in the file {path}.
    {path} 파일에 무엇이 적혀 있나요? / {path} 파일을 읽어 주세요. / {path} 파일의 글이 궁금합니다.
file_write: Replace the text of the file {path} by '{text}' and tell me what it said before.
    / Write '{text}' into the file {path}. What was its old text?
    / From now on the file {path} should say '{text}'; give me the words that this replaces.
    {path} 파일의 내용을 '{text}'(으)로 바꾸고 전에 무엇이 적혀 있었는지 알려 주세요.
    / {path} 파일에 '{text}'(을)를 써 주세요. 이전 내용은 무엇인가요? / 앞으로 {path} 파일은 '{text}'(이)라고 해야 합니다. 그 자리에 있던 글을 주세요.
calendar_add: Book '{title}' in the calendar on {day} at {hour}:00 and give me the booking number.
    / Put '{title}' into the calendar: {day}, {hour}:00. What is its number?
    / The calendar needs an entry '{title}' for {hour}:00 on {day}; tell me under which number it went in.
    캘린더에 {day} {hour}시 '{title}' 일정을 넣고 예약 번호를 알려 주세요. / '{title}' 일정을 캘린더 {day} {hour}시에 잡아 주세요. 번호가 무엇인가요?
    / 캘린더의 {day} {hour}시 자리에 '{title}' 항목이 있어야 합니다. 몇 번으로 들어갔는지 말해 주세요.
calendar_move: Move the booking {id} in the calendar to {day}, {hour}:00. What is its new number?
    / In the calendar, shift {id} to {day} at {hour}:00 and give me the new number.
    / The calendar's booking {id} happens at {hour}:00 on {day} instead; which number has it now?
    캘린더의 {id} 예약을 {day} {hour}시로 옮겨 주세요. 새 번호는 무엇인가요? / 캘린더에서 {id} 일정을 {day} {hour}시로 변경하고 새 번호를 알려 주세요.
    / 캘린더의 {id} 건은 {day} {hour}시에 하기로 했습니다. 이제 몇 번인가요?
calendar_cancel: Cancel the booking {id} in the calendar and tell me its title. / Take {id} out of the calendar. What was it called?
    / The calendar's booking {id} is off: strike it, and name what was planned.
    캘린더의 {id} 예약을 취소하고 제목을 알려 주세요. / 캘린더에서 {id} 일정을 빼 주세요. 이름이 무엇이었나요?
    / 캘린더의 {id} 건은 없던 일로 하고, 무슨 일정이었는지 말해 주세요.
sql_one: The table {table} of the database has the columns name, maker, price, stock. What is the {column} of '{item}'?
    / Ask the database for the {column} of '{item}' (table {table}: name, maker, price, stock).
    / In the database there is {table}(name, maker, price, stock); I need one value, the {column} where the name is '{item}'.
    데이터베이스의 {table} 표에는 name, maker, price, stock 열이 있습니다. '{item}'의 {column} 값은 얼마인가요?
    / 데이터베이스에서 '{item}'의 {column} 값을 조회해 주세요 ({table} 표: name, maker, price, stock).
    / 데이터베이스에 {table}(name, maker, price, stock)이 있습니다. name이 '{item}'인 줄의 {column} 하나만 필요합니다.
sql_sum: The table {table} of the database has the columns name, maker, price, stock. Add up the {column} of all that '{maker}' makes.
    / Ask the database for the total {column} of the maker '{maker}' (table {table}: name, maker, price, stock).
    / In the database there is {table}(name, maker, price, stock); what is the {column} of all rows of '{maker}' taken together?
    데이터베이스의 {table} 표에는 name, maker, price, stock 열이 있습니다. 제조사 '{maker}' 제품의 {column} 합계는 얼마인가요?
    / 데이터베이스에서 제조사 '{maker}'의 {column} 총합을 조회해 주세요 ({table} 표: name, maker, price, stock).
    / 데이터베이스에 {table}(name, maker, price, stock)이 있습니다. maker가 '{maker}'인 줄들의 {column} 값을 모두 더하면 몇인가요?
open: Which access code does document {id} give? / Open document {id} and tell me the access code in it.
    / Document {id} mentions an access code; I need that number.
    문서 {id}에 나오는 출입 코드는 무엇인가요? / 문서 {id}(을)를 열어 출입 코드를 알려 주세요.
    / 문서 {id} 안에 출입 코드가 적혀 있습니다. 그 숫자가 필요해요.
python: The file {path} has one integer per line. Run Python to find {what}.
    / Use Python on the file {path} (an integer on each line): what is {what}?
    / With a Python program over the integers in the lines of the file {path}, work out {what}.
    {path} 파일에는 한 줄에 정수가 하나씩 있습니다. 파이썬을 실행해 {what}(을)를 구해 주세요.
    / 파이썬으로 {path} 파일(줄마다 정수 하나)에서 {what}(을)를 알려 주세요.
    / {path} 파일의 줄마다 있는 정수를 파이썬 프로그램으로 읽고 {what}(을)를 계산해 주세요.
kv_set?: I want a new value for '{key}' in the store, and to know what it held before.
    / Please change the store's key '{key}' and tell me the old value.
    / The store's entry '{key}' is out of date; replace it, and let me hear what it was.
    저장소의 '{key}' 값을 새로 바꾸고 이전 값을 알려 주세요. / 저장소의 '{key}' 키를 다른 값으로 고치고 옛 값을 알려 주세요.
    / 저장소 항목 '{key}' 값이 낡았습니다. 교체하고 무엇이었는지 말해 주세요.
kv_add?: The number under '{key}' in the store has to go up. What is it then?
    / Please raise '{key}' in the store and tell me the new number.
    / Some more have come in for the store's counter '{key}'; where does it stand now?
    저장소의 '{key}' 수를 올려 주세요. 그러면 얼마인가요? / 저장소의 '{key}' 값에 좀 더해 주시고 새 값을 알려 주세요.
    / 저장소 계수기 '{key}' 항목이 더 늘었습니다. 이제 몇인가요?
file_write?: Replace the text of the file {path} and tell me what it said before.
    / Write something else into the file {path}. What was its old text?
    / The file {path} should say something new from now on; give me the words that go.
    {path} 파일의 내용을 바꾸고 전에 무엇이 적혀 있었는지 알려 주세요. / {path} 파일을 새로 써 주세요. 이전 내용은 무엇인가요?
    / 앞으로 {path} 파일은 다른 말을 해야 합니다. 사라지는 글을 주세요.
calendar_add?: Book '{title}' in the calendar and give me the booking number. / Put '{title}' into the calendar. What is its number?
    / The calendar needs an entry '{title}'; tell me under which number it went in.
    캘린더에 '{title}' 일정을 넣고 예약 번호를 알려 주세요. / '{title}' 일정을 캘린더에 잡아 주세요. 번호가 무엇인가요?
    / 캘린더에 '{title}' 항목이 있어야 합니다. 몇 번으로 들어갔는지 말해 주세요.
calendar_move?: Move the booking {id} in the calendar. What is its new number?
    / In the calendar, {id} has to be at another time; give me the new number.
    / The calendar's booking {id} cannot stay where it is; which number does it get?
    캘린더의 {id} 예약을 옮겨 주세요. 새 번호는 무엇인가요? / 캘린더의 {id} 일정 시간을 변경하고 새 번호를 알려 주세요.
    / 캘린더의 {id} 건은 그때 못 합니다. 이제 몇 번이 되나요?
reply: It is {missing}. / {missing}, please. / Make that {missing}.
    {missing}입니다. / {missing}(으)로 해 주세요. / {missing}, 그렇게 부탁합니다.
batch: Please do all of this:{list}Give the results {order}, separated by commas.
    / I need several things:{list}Answer with all results {order}, with commas between them.
    / Here is a list of things that have nothing to do with each other:{list}When all are done, name the results {order}, commas in between.
    다음을 모두 해 주세요:{list}결과를 {order} 쉼표로 나누어 주세요. / 여러 가지가 필요합니다:{list}모든 결과를 {order} 쉼표로 이어 답해 주세요.
    / 서로 관계없는 일들의 목록입니다:{list}다 끝나면 결과를 {order} 쉼표로 구분해 적어 주세요.
pointers: The key '{key}' in the store holds the name of another key, and so on. Follow them until you find a number.
    / Start at '{key}' in the store: each value is the next key to read. Which number stands at the end?
    / In the store '{key}' points to a key, which may point to a further one; what is the number that the trail leads to?
    저장소의 '{key}' 키에는 다른 키의 이름이 있고, 계속 이어집니다. 수가 나올 때까지 따라가 주세요.
    / 저장소의 '{key}' 키에서 시작하세요. 값이 곧 다음에 읽을 키입니다. 끝에 있는 수는 무엇인가요?
    / 저장소의 '{key}' 항목은 어떤 키를 가리키고, 그 키가 또 다른 키를 가리킬 수 있습니다. 그 길의 끝은 어떤 수인가요?
scaled: Multiply the number under '{key}' in the store by {m}, add {c}, and write the result under '{other}'. Answer with the result.
    / Read '{key}' from the store, compute {m} times that plus {c}, and store it as '{other}'. What is it?
    / The store's '{other}' should become {m} times '{key}', and {c} more; tell me the number that you put there.
    저장소의 '{key}' 수에 {m}(을)를 곱하고 {c}(을)를 더해 '{other}' 키에 쓰세요. 결과를 답해 주세요.
    / 저장소에서 '{key}' 값을 읽어 {m}배 한 뒤 {c}(을)를 더하고 '{other}' 키로 저장해 주세요. 얼마인가요?
    / 저장소의 '{other}' 항목은 '{key}' 값의 {m}배보다 {c} 큰 수여야 합니다. 거기 넣은 수를 말해 주세요.
fallback: '{key}' in the store names another key. Add {amount} to that one, or set it to {amount} if it is not a number. What did it hold before?
    / Raise the key whose name is under '{key}' in the store by {amount}; if it holds no number, write {amount} there. Tell me its old value.
    / The store's '{key}' tells you a key: it goes up by {amount}, and where there is no number it becomes {amount}. I want its value from before.
    저장소의 '{key}' 키에 다른 키의 이름이 있습니다. 그 키에 {amount}(을)를 더하되, 수가 아니면 {amount}(으)로 바꾸세요. 이전 값은 무엇인가요?
    / 저장소의 '{key}' 키가 가리키는 키를 {amount}만큼 올리고, 수가 아니라면 {amount}(을)를 쓰세요. 옛 값을 알려 주세요.
    / 저장소의 '{key}' 항목이 키 하나를 알려 줍니다. 거기 수가 있으면 {amount} 늘리고 없으면 {amount} 자체로 만드세요. 전의 값이 필요합니다.
research: Find the document about the {name} station. What is its access code?
    / Search the documents for the {name} station and tell me the access code.
    / Somewhere in the documents the {name} station is described; which access code does it have?
    {name} 역에 관한 문서를 찾아 주세요. 출입 코드는 무엇인가요? / 문서에서 {name} 역을 검색해 출입 코드를 알려 주세요.
    / 문서 어딘가에 {name} 역 설명이 있습니다. 그곳의 출입 코드가 필요합니다.
invoice: The file {path} names a product. What do {num} of it cost by the price in the table {table} (name, maker, price, stock) of the database?
    / Read the product's name in the file {path}, look up its price in the database (table {table}: name, maker, price, stock), and multiply it by {num}.
    / Somebody orders {num} of the product in the file {path}; with the prices of {table}(name, maker, price, stock) in the database, how much is that?
    {path} 파일에 제품 이름이 있습니다. 데이터베이스 {table} 표(name, maker, price, stock)의 가격으로 {num}개는 얼마인가요?
    / {path} 파일에서 제품 이름을 읽고 데이터베이스({table} 표: name, maker, price, stock)에서 price를 찾아 {num}(을)를 곱해 주세요.
    / {path} 파일에 적힌 제품을 {num}개 주문받았습니다. 데이터베이스의 {table}(name, maker, price, stock) 값으로 모두 얼마가 되나요?
transfer: In the database's table {table} (name, maker, price, stock), set the stock of '{a}' to the stock of '{b}'. Answer with the new stock.
    / Copy the stock of '{b}' to '{a}' in the database (table {table}: name, maker, price, stock) and tell me the number.
    / '{a}' should have as much stock as '{b}' in {table}(name, maker, price, stock) of the database; how much is that?
    데이터베이스의 {table} 표(name, maker, price, stock)에서 '{a}'의 stock을 '{b}'의 stock 값으로 바꾸세요. 새 값을 답해 주세요.
    / 데이터베이스({table} 표: name, maker, price, stock)에서 '{b}'의 stock을 '{a}'에 복사하고 그 수를 알려 주세요.
    / 데이터베이스의 {table}(name, maker, price, stock)에서 '{a}'의 stock은 '{b}'와 같아야 합니다. 얼마가 되나요?
booking: Book '{title}' in the calendar on {day} at {hour}:00, or at the next hour that is free. Give me the booking number.
    / Put '{title}' into the calendar: {day}, {hour}:00; while that hour is taken, try the one after it. What is the number?
    / '{title}' goes into the calendar on {day} as early as possible from {hour}:00 on; under which number did it go in?
    캘린더에 {day} {hour}시 '{title}' 일정을 넣되, 차 있으면 다음 빈 시간에 넣으세요. 예약 번호를 알려 주세요.
    / '{title}' 일정을 캘린더 {day} {hour}시에 잡고, 이미 있으면 한 시간씩 뒤로 미루세요. 번호가 무엇인가요?
    / 캘린더의 {day} {hour}시부터 가장 이른 빈자리에 '{title}' 항목을 넣습니다. 몇 번으로 들어갔나요?
cleanup: Delete the file {path}, or {other} if there is no such file. Write what it said under '{key}' in the store and tell me.
    / Remove the file {path}; if it does not exist, remove {other} instead. Keep its text in the store as '{key}'. What is it?
    / One of the files {path} and {other} exists, try them in this order: it goes, and its text moves to '{key}' in the store. What text is that?
    {path} 파일을 지우되, 없으면 {other} 파일을 지우세요. 그 내용을 저장소의 '{key}' 키에 쓰고 알려 주세요.
    / {path} 파일을 삭제하고, 없다면 대신 {other} 파일을 삭제하세요. 그 글을 저장소에 '{key}' 키로 남기세요. 무엇인가요?
    / {path}, {other} 파일 중 하나만 있으니 이 순서로 해 보세요. 파일은 없애고 글은 저장소의 '{key}' 항목으로 옮깁니다. 어떤 글인가요?
outside: Call {name} and say that I am late. / Order two pizzas to room {number}. / Switch on the lights of {name}.
    / Turn the volume of the radio to {number}. / Send an e-mail to {name} about room {number}.
    / Print {number} copies of my ticket for {name}. / Fly the drone to {name}. / Transfer {number} dollars to {name}.
    / Translate the sign at {name} into French. / Play a song by {name}. / Lock door {number}. / Take a photo of {name}.
    {name}에게 전화해서 늦는다고 전해 주세요. / {number}호로 피자 두 판을 주문해 주세요. / {name} 조명을 켜 주세요.
    / 라디오 음량을 {number}(으)로 맞춰 주세요. / {name}에게 {number}호에 대한 전자우편을 보내 주세요. / {name} 표를 {number}장 인쇄해 주세요.
    / 드론을 {name}(으)로 날려 주세요. / {name}에게 {number}달러를 송금해 주세요. / {name} 표지판을 프랑스어로 옮겨 주세요.
    / {name}의 노래를 틀어 주세요. / {number}번 문을 잠가 주세요. / {name} 사진을 찍어 주세요.
"""
WORDINGS = {}  # kind -> {"en": (two to train on, one held out), "ko": ...}
for _entry in re.split(r"\n(?=\S)", _TEXT.strip()):
    _kind, _, _both = _entry.partition(": ")
    _texts = re.split(r"\n    (?!/)", _both)  # a line that does not go on with a slash begins the Korean half
    WORDINGS[_kind] = {lang: tuple(re.split(r"\s+/ ", text)) for lang, text in zip(("en", "ko"), _texts, strict=True)}
