import sys, time, pytest
sys.path.insert(0, "/work/main")
from tests.support.listening import listening
def test_hold(listening):
    print(listening.url, flush=True)
    open("/tmp/listen_env.txt","w").write(listening.url+"\n"+"\n".join(f"{k}={v}" for k,v in listening.environment.items()))
    import os
    while not os.path.exists("/tmp/listen_stop"):
        time.sleep(0.2)
