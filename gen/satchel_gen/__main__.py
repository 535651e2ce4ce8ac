"""python -m satchel_gen"""

from .cli import app

if __name__ == "__main__":
    app()
