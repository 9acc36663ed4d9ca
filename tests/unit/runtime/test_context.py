from pathlib import Path

from services.runtime.database import Reader, open_database
from services.runtime.principal import Principal, bind_principal, current_principal


def who(_tx: Reader) -> str:
    return current_principal().user_id


async def test_a_function_knows_who_asked_reading_and_writing(tmp_path: Path) -> None:
    database = open_database(f"sqlite:///{tmp_path / 'database.sqlite'}")
    await database.start()
    bind_principal(Principal(user_id="usr_1"))

    asked = await database.read(who), await database.write(who)

    assert asked == ("usr_1", "usr_1")
    bind_principal(None)
    await database.close()
