"""Word lists behind the generated text: table names, column names and values.

The ``HELD_OUT`` lists share no word with the training lists, so that validation and test
questions are about things that no training question ever mentions.
"""


def _words(text: str) -> tuple[str, ...]:
    """Split a list of words; an underscore stands for the space inside a value of two words."""
    return tuple(word.replace("_", " ") for word in text.split())


def _pairs(first: str, second: str) -> tuple[str, ...]:
    """Return every two-word column name made from a word of each list."""
    return tuple(f"{a}_{b}" for a in first.split() for b in second.split())


TABLES = _words("""
    actors airports albums anchors apartments apples artists athletes badges bakeries balloons banks barns
    baskets beaches beds bells benches bicycles boats books bottles bowls boxes bracelets bridges brushes
    buildings buses buttons cabins cafes cakes cameras camps canals candles carpets cars castles cats
    caves cellos chairs chefs cheeses churches cinemas circuits cities clients clinics clocks clouds clubs
    coats coins comets companies computers concerts cookies countries courses crops cups dancers deserts
    desks devices dogs dolls doors dragons dresses drills drivers drums engines exams factories farms
    ferries festivals films fish flags flights flowers forests forks fountains foxes games gardens gates
    glaciers gloves goats guests guitars hammers harbours hats hills horses hospitals hotels houses
    islands jackets jewels jobs journeys judges keys kites knives lakes lamps lawyers lessons letters
    libraries lions lizards machines magazines maps markets matches meals medals meetings mirrors models
    monkeys motors mountains movies museums needles nurses offices orchards ovens owls paintings palaces
    parcels parks parties pencils phones photos pianos pilots pipes planes planets plants plates players
    poems ponds posters prizes projects puzzles rabbits radios recipes rings rivers roads robots rockets
    roofs ropes sailors salads satellites schools screens sculptures shelves ships shirts shoes shops
    singers snakes sofas soldiers songs spoons stadiums stamps stars statues stores storms streets
    students suitcases taxis teachers teams temples tents theatres tickets tigers tools towers towns toys
    tractors trains trees trucks tunnels umbrellas vases videos villages violins volcanoes wagons wallets
    wars watches wells whales windows wines wolves workers writers
""")

HELD_OUT_TABLES = _words("""
    antennas barrels beetles birds blankets cathedrals cyclists dolphins embassies eagles galaxies
    gymnasts helicopters insects kettles lanterns lighthouses meadows moths novels pastries penguins
    pillows quilts reptiles saddles sandwiches scooters sculptors submarines swimmers teapots telescopes
    trumpets turtles vans warehouses waterfalls yachts zoos
""")

TEXT_COLUMNS = _words("""
    name title city country colour shape brand owner author genre language status category kind material
    maker address street state continent nationality flavour fabric pattern nickname sponsor winner
    captain coach manager director editor publisher supplier teacher doctor guide driver climate weather
    season month weekday format medium tribe breed species gender mood theme topic subject grade logo
    motto label symbol
""") + _pairs(
    "home birth main local family second favourite team former native party head",
    "town place nation style partner mascot sport animal job",
)

HELD_OUT_TEXT_COLUMNS = _words("""
    region surname province architect composer dialect profession currency religion habitat texture
    landlord designer inspector venue anthem emblem
""") + _pairs("primary legal inner roof", "district keeper finish tone guild")

NUMBER_COLUMNS = _words("""
    age weight height length width depth price cost year score rating speed size area volume capacity
    distance salary budget population temperature duration pages seats floors goals wins losses visitors
    members rooms doors stars votes sales profit income debt rent tax points power energy pressure
    humidity battery stock mileage bonus fee fine noise
""") + _pairs(
    "engine crew wheel tank body ticket summer winter night guest water door",
    "load limit level mass radius angle share charge quota",
)

HELD_OUT_NUMBER_COLUMNS = _words("""
    altitude voltage calories enrolment attendance brightness revenue discount latitude acreage horsepower
    elevation tonnage frequency dosage wages throughput
""") + _pairs("wing tail petal cargo rotor", "span girth torque yield tally")

VALUES = _words("""
    Norway Sweden France Spain Italy Greece Turkey Egypt Kenya Ghana Japan China India Nepal Peru Chile
    Brazil Mexico Canada Cuba Ireland Poland Austria Hungary Portugal Morocco Vietnam Australia Paris
    London Berlin Madrid Rome Vienna Athens Cairo Tokyo Delhi Lima Boston Chicago Dallas Denver Seattle
    Toronto Dublin Oxford Leeds Bristol York Glasgow Geneva Milan Naples Venice Porto Warsaw Prague Moscow
    Sydney Perth Anna Ben Carla David Emma Frank Grace Henry Ivan Julia Karl Laura Martin Nina Oscar Paula
    Robert Sara Thomas Victor Wendy Alice Brian Clara Daniel Elena George Hannah Jack Kate Leo Maria Nora
    Peter Rosa Simon Tina Walter Smith Jones Brown Taylor Wilson Davies Evans Walker Wright Green Baker
    Carter Cooper Turner Parker red blue green yellow black white brown grey pink purple gold silver wood
    steel glass stone cotton wool silk leather paper plastic small medium large tiny huge round square
    oval flat new old modern classic rare common open closed active ready broken empty full heavy light
    fast slow soft hard hot cold warm dry wet Monday Tuesday Friday Sunday January March April August
    October spring summer winter morning evening English French German Spanish Greek rock jazz pop folk
    drama comedy horror tennis football chess north south east west rice bread soup New_York San_Diego
    Hong_Kong South_Korea Cape_Town dark_red light_blue Mary_Stone John_Hill Paul_Young New_Zealand
    Los_Angeles pale_green Lucy_Hall Peter_Long West_Coast
""")

HELD_OUT_VALUES = _words("""
    Iceland Finland Denmark Belgium Croatia Bolivia Ecuador Uganda Malaysia Thailand Lisbon Munich Zurich
    Oslo Helsinki Nairobi Bogota Manila Kyoto Osaka Houston Atlanta Montreal Cardiff Belfast Florence
    Krakow Adam Bella Dario Fiona Gloria Hugo Irene Kevin Linda Monica Nathan Olivia Quentin Rachel Sofia
    Trevor Ursula Harrison Mitchell Phillips Campbell orange violet crimson turquoise marble copper bamboo
    velvet crooked curved ancient fragile Thursday Saturday February November Portuguese Danish opera
    poetry rugby hockey Buenos_Aires Sierra_Leone Martha_Flint misty_violet Puerto_Rico Ingrid_Marsh
""")

# General vocabulary of the pretraining stories and lists.
THINGS = _words("""
    acorn anvil apron arrow axe bag ball basin bead beam belt blade board bolt bone book boot bow branch
    bread brick broom bucket bulb cable cage canoe card carrot chain chalk chart chest clay cloth coal
    cone cord cork crown cushion dagger dice dish drawer drum dust egg fan feather fence fiddle file flask
    flute fork frame fruit gem glove glue grain grape hat helmet herb hinge honey hook horn ink jar jelly
    jug kite knot lace ladder lamp leaf lemon lens letter lid lime lock loom map mask mat melon milk mint
    mitten mop mug nail napkin needle nest net note nut oar oil onion paint pan pear pebble pen pepper pin
    pitcher plank plough plum pot powder pump purse rack rake razor reed ribbon ring robe rod root rope
    rug sack salt sand saw scarf seed shell shield shovel sieve silk skirt sled soap sock spade spear
    spice sponge spoon stick stool stove straw string sugar sword tape tile torch towel tray trunk tube
    twig vase vest violin wagon wax wheel whip whistle wire wool yarn
""")

PLACES = _words("""
    attic bakery balcony bank barn beach bridge cabin castle cave cellar chapel cottage courtyard dock
    farm field forest garden garage gate hall harbour hill hotel hut island kitchen lake library market
    mill mine museum office orchard palace park pier port quarry river school shed shop square stable
    station street studio temple theatre tower tunnel valley village well workshop yard
""")

ADJECTIVES = _words("""
    able bitter blunt bold brave brief bright calm cheap clean clever clumsy cosy crisp curious damp dark
    dear deep dim dull eager early easy exact faint fair famous fancy fierce fine firm fond fresh funny
    gentle glad grand grave great happy harsh hollow honest humble idle keen kind late lazy lively lonely
    loud lucky mild modest narrow neat nimble noble noisy odd pale plain polite poor proud pure quick
    quiet rapid rich ripe rough royal sad safe sharp shiny short shy silent silly simple sleepy slim small
    smart smooth solid sour steady steep stiff strange strict strong sweet swift tall tame tender thick
    thin tidy tight tired tough vast warm weak weary wide wild wise witty young
""")

PEOPLE = _words("""
    Abel Ada Agnes Albert Amos Amy Arthur Audrey Beatrix Bernard Bruno Cecil Celia Chester Colin Cora
    Cyril Dora Duncan Edgar Edith Edwin Elsie Ernest Esther Ethel Eva Felix Flora Fred Gilbert Gwen Harold
    Harriet Hazel Hector Herbert Hilda Horace Ida Iris Isaac Ivy Jasper Joan Joel Judith June Keith Lena
    Lewis Lily Lloyd Lois Louis Lucas Mabel Marcus Maud Miles Millie Milo Mona Morris Myra Ned Nell Norman
    Olive Opal Oswald Otto Pearl Percy Philip Phoebe Ralph Rex Rita Roger Roland Rose Ruby Rufus Ruth Sam
    Silas Stella Sybil Ted Theo Tilda Toby Una Vera Vince Viola Wallace Wilma Winnie Zoe
""")
